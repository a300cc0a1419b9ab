package client_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"os"
	"strings"
	"sync"
	"testing"

	"xapi-nbd/internal/testcert"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
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
			writeAndRead(t, ctx, conn, path, content, false)
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

// writeAndRead writes a part of the export, whose file is at path, and reads all of it. It
// changes content accordingly.
func writeAndRead(t *testing.T, ctx context.Context, conn *client.Conn, path string, content []byte, fua bool) {
	t.Helper()
	data := nbdtest.Bytes(300_000, 0, 9)
	copy(content[900_000:], data)
	if err := errors.Join(conn.Write(ctx, data, 900_000, fua), conn.Flush(ctx)); err != nil {
		t.Error(err)
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, content) {
		t.Errorf("after a write: error %v or wrong content of the file", err)
	}
	readEverything(t, ctx, conn, content)
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
