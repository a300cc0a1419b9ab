package client_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"xapi-nbd/internal/testcert"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
	"xapi-nbd/test/requires"
)

// serverCertificates fills a folder as nbdkit and qemu want it: a CA and a
// certificate that it signed, because qemu serves with none that is a CA's.
// trust is for the client.
func serverCertificates(t *testing.T) (dir string, trust *tls.Config) {
	t.Helper()
	ca := testcert.Sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: "test CA"},
		IsCA:    true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, nil, nil)
	template := testcert.Server(nbdtest.ServerName)
	template.IsCA, template.KeyUsage = false, x509.KeyUsageDigitalSignature
	dir = t.TempDir()
	if err := testcert.Sign(template, nil, ca).WriteFolder(dir, "server", ca); err != nil {
		t.Fatal(err)
	}
	return dir, ca.ClientConfig(nbdtest.ServerName)
}

// liveTLSServers start a server of a file that requires TLS.
var liveTLSServers = map[string]func(t *testing.T, path, certificates string) (socket string){
	"nbdkit": func(t *testing.T, path, certificates string) string {
		return nbdkit(t, "--tls=require", "--tls-certificates="+certificates, "file", path)
	},
	"qemu-nbd": func(t *testing.T, path, certificates string) string {
		return qemuNBD(t, "--object", "tls-creds-x509,id=tls0,endpoint=server,verify-peer=no,dir="+certificates,
			"--tls-creds=tls0", path)
	},
}

func TestLiveTLS(t *testing.T) {
	for name, serve := range liveTLSServers {
		t.Run(name, func(t *testing.T) {
			path, content := sparseFile(t)
			dir, trust := serverCertificates(t)
			socket := serve(t, path, dir)
			ctx, c := dialLive(t, socket, &client.Config{TLSConfig: trust, MetaContexts: []string{wire.BaseAllocation}})
			if state := c.TLS(); state == nil || !state.HandshakeComplete {
				t.Errorf("TLS state %+v", state)
			}
			if !c.Structured() {
				t.Error("structured replies were not agreed on")
			}
			if list, err := c.List(ctx); err != nil || len(list) != 1 || list[0].Name != "" {
				t.Errorf("list %q, error %v", list, err)
			}
			if got, err := c.ListMetaContexts(ctx, ""); err != nil || !strings.Contains(strings.Join(got, " "), wire.BaseAllocation) {
				t.Errorf("contexts %q, error %v", got, err)
			}
			conn, err := c.Go(ctx, "")
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			readEverything(t, ctx, conn, content)
			checkZeroes(t, ctx, conn, content)
			data := nbdtest.Bytes(300_000, 0, 9)
			copy(content[900_000:], data)
			if err := errors.Join(conn.Write(ctx, data, 900_000, false), conn.Flush(ctx)); err != nil {
				t.Error(err)
			}
			if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, content) {
				t.Errorf("after a write: error %v or wrong content of the file", err)
			}
			readEverything(t, ctx, conn, content)
		})
	}
}

// readEverything reads the whole export with concurrent reads.
func readEverything(t *testing.T, ctx context.Context, conn *client.Conn, want []byte) {
	t.Helper()
	if conn.Size() != int64(len(want)) {
		t.Fatalf("size %d, want %d", conn.Size(), len(want))
	}
	const piece = 150_001
	var wg sync.WaitGroup
	for off := 0; off < len(want); off += piece {
		wg.Go(func() {
			p := bytes.Repeat([]byte{1}, min(piece, len(want)-off))
			if err := conn.Read(ctx, p, int64(off)); err != nil || !bytes.Equal(p, want[off:off+len(p)]) {
				t.Errorf("read at %d: error %v or wrong data", off, err)
			}
		})
	}
	wg.Wait()
}

// checkZeroes compares the block status with the content. A file system
// without holes has none.
func checkZeroes(t *testing.T, ctx context.Context, conn *client.Conn, content []byte) {
	t.Helper()
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
			off += int64(e.Length)
		}
	}
}

// Without TLS the servers refuse every export; with another CA the client refuses the
// server.
func TestLiveTLSRefused(t *testing.T) {
	for name, serve := range liveTLSServers {
		t.Run(name, func(t *testing.T) {
			path, _ := sparseFile(t)
			dir, _ := serverCertificates(t)
			socket := serve(t, path, dir)
			ctx, c := dialLive(t, socket, nil)
			var refused *client.Error
			if _, err := c.Go(ctx, ""); !errors.As(err, &refused) || refused.Reply != wire.RepErrTLSReqd {
				t.Errorf("in the clear: got error %v, want NBD_REP_ERR_TLS_REQD", err)
			}
			_, stranger := serverCertificates(t)
			var unknown x509.UnknownAuthorityError
			if _, err := client.Dial(ctx, "unix", socket, &client.Config{TLSConfig: stranger}); !errors.As(err, &unknown) {
				t.Errorf("another CA: got error %v, want that it is unknown", err)
			}
		})
	}
}

// dialNBDServer runs nbd-server in the foreground, where it serves one
// connection and ends, and returns that connection.
func dialNBDServer(t *testing.T, cfg *client.Config, path string) (context.Context, *client.Client) {
	t.Helper()
	program := requires.Tool(t, "nbd-server")
	dir, err := os.MkdirTemp("", "nbd") // t.TempDir may be too long for the address of a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket, conf := filepath.Join(dir, "socket"), filepath.Join(dir, "conf")
	text := fmt.Sprintf("[generic]\nunixsock = %s\nallowlist = true\n"+
		"[disk]\nexportname = %[2]s\nflush = true\nfua = true\ntrim = true\n"+
		"[still]\nexportname = %[2]s\nreadonly = true\n", socket, path)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "-C", conf, "-d")
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
			t.Logf("nbd-server printed:\n%s", &out)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), livePatience)
	t.Cleanup(cancel)
	c, err := client.New(ctx, onlyConnection(t, ctx, socket, ended), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Abort() })
	return ctx, c
}

// onlyConnection is awaitSocket for a server that ends after its first connection, and
// returns that connection.
func onlyConnection(t *testing.T, ctx context.Context, socket string, ended <-chan struct{}) net.Conn {
	t.Helper()
	ticker := time.NewTicker(5 * time.Millisecond)
	defer ticker.Stop()
	for {
		var d net.Dialer
		nc, err := d.DialContext(ctx, "unix", socket)
		if err == nil {
			t.Cleanup(func() { nc.Close() })
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

// The reference server supports neither structured replies nor metadata contexts.
func TestLiveNBDServer(t *testing.T) {
	path, content := sparseFile(t)
	ctx, c := dialNBDServer(t, withAllocation, path)
	if c.Structured() {
		t.Error("structured replies were agreed on")
	}
	list, err := c.List(ctx)
	if names := fmt.Sprint(list); err != nil || len(list) != 2 || !strings.Contains(names, "disk") || !strings.Contains(names, "still") {
		t.Errorf("list %v, error %v", list, err)
	}
	conn, err := c.Go(ctx, "disk")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	readEverything(t, ctx, conn, content)
	if _, err := conn.BlockStatus(ctx, wire.BaseAllocation, 0, 4096); !errors.Is(err, client.ErrUnsupported) {
		t.Errorf("block status: got error %v, want ErrUnsupported", err)
	}
	data := nbdtest.Bytes(300_000, 0, 9)
	copy(content[900_000:], data)
	if err := errors.Join(conn.Write(ctx, data, 900_000, true), conn.Flush(ctx)); err != nil {
		t.Error(err)
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, content) {
		t.Errorf("after a write: error %v or wrong content of the file", err)
	}
	readEverything(t, ctx, conn, content)
}

func TestLiveNBDServerReadOnly(t *testing.T) {
	path, content := sparseFile(t)
	ctx, c := dialNBDServer(t, nil, path)
	conn, err := c.Go(ctx, "still")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	readEverything(t, ctx, conn, content)
	if err := conn.Write(ctx, make([]byte, 512), 0, false); !errors.Is(err, client.ErrUnsupported) {
		t.Errorf("write to a read-only export: got error %v", err)
	}
}

// An unknown name is refused.
func TestLiveNBDServerNames(t *testing.T) {
	path, _ := sparseFile(t)
	ctx, c := dialNBDServer(t, nil, path)
	var refused *client.Error
	if _, err := c.Go(ctx, "other"); !errors.As(err, &refused) || refused.Reply != wire.RepErrUnknown {
		t.Errorf("got error %v, want NBD_REP_ERR_UNKNOWN", err)
	}
}
