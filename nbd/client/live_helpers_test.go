package client_test

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
	"xapi-nbd/test/requires"
)

// livePatience is how long a server may take to start, and a test to run
// against it. It only matters to tests that fail.
const livePatience = 30 * time.Second

// startServer runs a server that listens on a unix socket, with the arguments that args
// returns. It is stopped at the end of the test. If the test failed, its output is shown.
func startServer(t *testing.T, name string, args func(socket string) []string) (socket string) {
	t.Helper()
	socket = filepath.Join(socketDir(t), "socket")
	ended := runServer(t, name, args(socket)...)
	ctx, cancel := context.WithTimeout(t.Context(), livePatience)
	defer cancel()
	awaitConn(t, ctx, socket, ended).Close()
	return socket
}

// socketDir returns a folder for a socket. t.TempDir may be too long for its address.
func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// runServer runs a server until the end of the test. ended is closed when it has ended.
func runServer(t *testing.T, name string, args ...string) (ended <-chan struct{}) {
	t.Helper()
	cmd := exec.Command(requires.Tool(t, name), args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		cmd.Wait()
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-done
		if t.Failed() {
			t.Logf("%s printed:\n%s", name, &out)
		}
	})
	return done
}

// awaitConn returns the first connection to the socket that succeeds: the servers give no
// other sign that they listen. The caller closes it.
func awaitConn(t *testing.T, ctx context.Context, socket string, ended <-chan struct{}) net.Conn {
	t.Helper()
	ticker := time.NewTicker(5 * time.Millisecond)
	defer ticker.Stop()
	for {
		var d net.Dialer
		nc, err := d.DialContext(ctx, "unix", socket)
		if err == nil {
			return nc
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
