package client_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
	"xapi-nbd/test/requires"
)

// livePatience is how long a server may take to start, and a test to run
// against it. It only matters to tests that fail.
const livePatience = 30 * time.Second

// startServer runs a server that listens on a unix socket; args says with what
// arguments. It is stopped at the end of the test. What it printed is shown if
// the test failed.
func startServer(t *testing.T, name string, args func(socket string) []string) (socket string) {
	t.Helper()
	path := requires.Tool(t, name)
	dir, err := os.MkdirTemp("", "nbd") // t.TempDir may be too long for the address of a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket = filepath.Join(dir, "socket")
	cmd := exec.Command(path, args(socket)...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		cmd.Wait()
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-ended
		if t.Failed() {
			t.Logf("%s printed:\n%s", name, &out)
		}
	})
	awaitSocket(t, socket, ended)
	return socket
}

// awaitSocket returns when a connection to the socket succeeds: the servers give no other
// sign that they listen.
func awaitSocket(t *testing.T, socket string, ended <-chan struct{}) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), livePatience)
	defer cancel()
	ticker := time.NewTicker(5 * time.Millisecond)
	defer ticker.Stop()
	for {
		var d net.Dialer
		nc, err := d.DialContext(ctx, "unix", socket)
		if err == nil {
			nc.Close()
			return
		}
		select {
		case <-ticker.C:
		case <-ended:
			t.Fatalf("the server has ended: %v", err)
		case <-ctx.Done():
			t.Fatalf("the server does not listen: %v", err)
		}
	}
}

func nbdkit(t *testing.T, args ...string) string {
	t.Helper()
	return startServer(t, "nbdkit", func(socket string) []string {
		return append([]string{"--foreground", "--unix", socket}, args...)
	})
}

func qemuNBD(t *testing.T, args ...string) string {
	t.Helper()
	return startServer(t, "qemu-nbd", func(socket string) []string {
		return append([]string{"--socket", socket, "--persistent", "--shared=8", "--format=raw"}, args...)
	})
}

func dialLive(t *testing.T, socket string, cfg *client.Config) (context.Context, *client.Client) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), livePatience)
	t.Cleanup(cancel)
	c, err := client.Dial(ctx, "unix", socket, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Abort() })
	return ctx, c
}

func goLive(t *testing.T, socket, export string, cfg *client.Config) (context.Context, *client.Conn) {
	t.Helper()
	ctx, c := dialLive(t, socket, cfg)
	conn, err := c.Go(ctx, export)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return ctx, conn
}

var withAllocation = &client.Config{MetaContexts: []string{wire.BaseAllocation}}

// sparseFile holds 1 MiB of data, a hole of 1 MiB, and half a MiB of data.
func sparseFile(t *testing.T) (path string, content []byte) {
	t.Helper()
	content = nbdtest.Bytes(5<<19, 0, 3)
	clear(content[1<<20 : 2<<20])
	path = filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, at := range []int{0, 2 << 20} {
		end := min(len(content), at+1<<20)
		if _, err := f.WriteAt(content[at:end], int64(at)); err != nil {
			t.Fatal(err)
		}
	}
	return path, content
}

// liveServers start a server of a sparse file.
var liveServers = map[string]func(t *testing.T, path string) (socket string){
	"nbdkit":   func(t *testing.T, path string) string { return nbdkit(t, "file", path) },
	"qemu-nbd": func(t *testing.T, path string) string { return qemuNBD(t, "--discard=unmap", path) },
}

func TestLiveReading(t *testing.T) {
	for name, serve := range liveServers {
		t.Run(name, func(t *testing.T) {
			path, content := sparseFile(t)
			socket := serve(t, path)
			for how, cfg := range map[string]*client.Config{"all": withAllocation, "simple": {NoStructured: true}, "nothing asked": nil} {
				t.Run(how, func(t *testing.T) {
					ctx, conn := goLive(t, socket, "", cfg)
					if conn.Size() != int64(len(content)) {
						t.Fatalf("size %d, want %d", conn.Size(), len(content))
					}
					var wg sync.WaitGroup
					for i := range 16 {
						wg.Go(func() {
							off := i * 150_001
							p := bytes.Repeat([]byte{1}, 200_000)
							if err := conn.Read(ctx, p, int64(off)); err != nil || !bytes.Equal(p, content[off:off+len(p)]) {
								t.Errorf("read at %d: error %v or wrong data", off, err)
							}
						})
					}
					wg.Wait()
					nbdtest.TestDevice(t, func() nbd.Device {
						_, conn := goLive(t, socket, "", cfg)
						return conn
					})
				})
			}
		})
	}
}

func TestLiveStatus(t *testing.T) {
	for name, serve := range liveServers {
		t.Run(name, func(t *testing.T) {
			path, content := sparseFile(t)
			socket := serve(t, path)
			ctx, c := dialLive(t, socket, withAllocation)
			if !c.Structured() {
				t.Error("structured replies were not agreed on")
			}
			if got, err := c.ListMetaContexts(ctx, ""); err != nil || !strings.Contains(strings.Join(got, " "), wire.BaseAllocation) {
				t.Errorf("contexts %q, error %v", got, err)
			}
			info, err := c.Info(ctx, "")
			if err != nil || info.Size != uint64(len(content)) || info.Flags&wire.FlagHasFlags == 0 {
				t.Errorf("information %+v, error %v", info, err)
			}
			conn, err := c.Go(ctx, "")
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			holes := int64(0)
			for off := int64(0); off < conn.Size(); {
				extents, err := conn.BlockStatus(ctx, wire.BaseAllocation, off, conn.Size()-off)
				if err != nil {
					t.Fatal(err)
				}
				for _, e := range extents {
					part := content[off : off+int64(e.Length)]
					if e.Status&wire.StateZero != 0 && !bytes.Equal(part, make([]byte, len(part))) {
						t.Errorf("%d bytes at %d are said to be zeroes", e.Length, off)
					}
					if e.Status&wire.StateHole != 0 {
						holes += int64(e.Length)
					}
					off += int64(e.Length)
				}
			}
			if holes != 0 && holes != 1<<20 { // a file system without holes has none
				t.Errorf("%d bytes of holes, want 1 MiB", holes)
			}
		})
	}
}

func TestLiveWriting(t *testing.T) {
	for name, serve := range liveServers {
		t.Run(name, func(t *testing.T) {
			path, content := sparseFile(t)
			ctx, conn := goLive(t, serve(t, path), "", nil)
			data := nbdtest.Bytes(300_000, 0, 9)
			copy(content[100_000:], data)
			clear(content[200_000:250_000])
			steps := []struct {
				name string
				err  error
			}{
				{"Write", conn.Write(ctx, data, 100_000, false)},
				{"WriteZeroes", conn.WriteZeroes(ctx, 200_000, 50_000, client.ZeroOptions{NoHole: true})},
				{"Trim", conn.Trim(ctx, 1<<20, 65536, false)}, // a hole already
				{"Flush", conn.Flush(ctx)},
			}
			if conn.Info().Flags&wire.FlagSendCache != 0 {
				if err := conn.Cache(ctx, 1, 100_000); err != nil {
					t.Errorf("Cache: %v", err)
				}
			}
			for _, s := range steps {
				if s.err != nil {
					t.Errorf("%s: %v", s.name, s.err)
				}
			}
			if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, content) {
				t.Errorf("error %v or wrong content of the file", err)
			}
		})
	}
}

// After the refusal of an unknown name the Client can be used further.
func TestLiveNames(t *testing.T) {
	path, _ := sparseFile(t)
	ctx, c := dialLive(t, qemuNBD(t, "--read-only", "--export-name=disk", "--description=a test", path), nil)
	list, err := c.List(ctx)
	if err != nil || len(list) != 1 || list[0] != (client.Export{Name: "disk", Description: "a test"}) {
		t.Errorf("list %q, error %v", list, err)
	}
	var refused *client.Error
	if _, err := c.Go(ctx, "other"); !errors.As(err, &refused) || refused.Reply != wire.RepErrUnknown {
		t.Errorf("got error %v, want NBD_REP_ERR_UNKNOWN", err)
	}
	conn, err := c.Go(ctx, "disk")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.Write(ctx, make([]byte, 512), 0, false); !errors.Is(err, client.ErrUnsupported) {
		t.Errorf("write to a read-only export: got error %v", err)
	}
}

func TestLiveErrors(t *testing.T) {
	for how, cfg := range map[string]*client.Config{"structured": nil, "simple": {NoStructured: true}} {
		t.Run(how, func(t *testing.T) {
			ctx, conn := goLive(t, nbdkit(t, "--filter=error", "memory", "1M", "error-pread=ENOMEM", "error-pread-rate=1"), "", cfg)
			for range 3 {
				if err := conn.Read(ctx, make([]byte, 4096), 0); !errors.Is(err, wire.ENOMEM) {
					t.Errorf("got error %v, want NBD_ENOMEM", err)
				}
				if err := conn.Write(ctx, make([]byte, 4096), 0, false); err != nil {
					t.Errorf("Write: %v", err)
				}
			}
		})
	}
}

// After a read whose context was done, the connection can be used further.
func TestLiveEndedContext(t *testing.T) {
	ctx, conn := goLive(t, nbdkit(t, "--filter=delay", "memory", "1M", "rdelay=3"), "", nil)
	soon, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	if err := conn.Read(soon, make([]byte, 4096), 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got error %v, want that of the context", err)
	}
	p := bytes.Repeat([]byte{1}, 4096)
	if err := conn.Read(ctx, p, 0); err != nil || !bytes.Equal(p, make([]byte, 4096)) {
		t.Errorf("the next read: error %v or wrong data", err)
	}
}

// nbdkit can offer less than it implements: the client works with that, or fails.
func TestLiveOldServers(t *testing.T) {
	t.Run("oldstyle", func(t *testing.T) {
		socket := nbdkit(t, "--oldstyle", "memory", "1M")
		if _, err := client.Dial(t.Context(), "unix", socket, nil); err == nil || !strings.Contains(err.Error(), "newstyle") {
			t.Errorf("got error %v, want a refusal", err)
		}
	})
	t.Run("no structured replies", func(t *testing.T) {
		ctx, conn := goLive(t, nbdkit(t, "--no-sr", "memory", "1M"), "", withAllocation)
		if err := conn.Read(ctx, make([]byte, 4096), 0); err != nil {
			t.Error(err)
		}
		if _, err := conn.BlockStatus(ctx, wire.BaseAllocation, 0, 4096); !errors.Is(err, client.ErrUnsupported) {
			t.Errorf("got error %v, want ErrUnsupported", err)
		}
	})
	for how, args := range map[string][]string{"mask": {"--mask-handshake=0"}, "no zeroes": {"--mask-handshake=2"}} {
		t.Run("not fixed newstyle, "+how, func(t *testing.T) {
			ctx, conn := goLive(t, nbdkit(t, append(args, "memory", "1M")...), "", nil)
			if err := conn.Read(ctx, make([]byte, 4096), 0); err != nil || conn.Size() != 1<<20 {
				t.Errorf("error %v, size %d", err, conn.Size())
			}
		})
	}
}
