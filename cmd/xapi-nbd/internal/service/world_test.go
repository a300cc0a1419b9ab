package service

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"xapi-nbd/cmd/xapi-nbd/internal/servicetest"
	"xapi-nbd/internal/testcert"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
	"xapi-nbd/xapi/xapitest"
)

// patience bounds every wait of these tests. No step is expected to take that long.
const patience = servicetest.Timeout

var (
	random     = servicetest.Random
	eventually = servicetest.Eventually
	lacking    = servicetest.Lacking
)

// world is a simulated host with a network and a certificate, for one service.
type world struct {
	t       *testing.T
	dir     string
	host    *xapitest.Host
	trust   *testcert.Files
	secrets []string // session refs that must not appear in any output
}

func newWorld(t *testing.T, cfg xapitest.Config) *world {
	t.Helper()
	// Not t.TempDir: the path of a unix socket is short.
	dir, err := os.MkdirTemp("", "xn")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	cfg.Dir = dir
	w := &world{t: t, dir: dir}
	if w.host, err = xapitest.Start(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.host.Close(); err != nil {
			t.Error(err)
		}
	})
	w.host.AddNetwork("insecure_nbd")
	if w.trust, err = testcert.NewFiles(dir); err != nil {
		t.Fatal(err)
	}
	return w
}

// file writes a file in the folder of the world and returns its path.
func (w *world) file(name, text string) string {
	w.t.Helper()
	path := filepath.Join(w.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
	return path
}

// addVDI adds a disk whose content is data.
func (w *world) addVDI(data []byte, spec xapitest.VDISpec) (uuid string) {
	w.t.Helper()
	spec.Image = w.file(fmt.Sprintf("image%d", len(data)), string(data))
	uuid, err := w.host.AddVDI(spec)
	if err != nil {
		w.t.Fatal(err)
	}
	return uuid
}

// export returns an export name for the VDI with a new session.
func (w *world) export(vdi string) string {
	ref := w.host.NewSession(xapitest.RoleVMAdmin)
	w.secrets = append(w.secrets, ref, strings.TrimPrefix(ref, "OpaqueRef:"))
	return w.host.ExportName(vdi, ref)
}

func (w *world) wantNoSecrets(what, text string) {
	w.t.Helper()
	for _, secret := range w.secrets {
		if strings.Contains(text, secret) {
			w.t.Errorf("%s contains a session ref:\n%s", what, text)
		}
	}
}

// endpoint is an address of a service.
type endpoint struct{ network, addr string }

// dial connects and greets, with TLS or without.
func (w *world) dial(at endpoint, secure bool) (*client.Client, error) {
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	var cfg client.Config
	if secure {
		cfg.TLSConfig = w.trust.Client
	}
	return client.Dial(ctx, at.network, at.addr, &cfg)
}

// open opens an export, with TLS or without.
func (w *world) open(at endpoint, name string, secure bool) (*client.Conn, error) {
	c, err := w.dial(at, secure)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	conn, err := c.Go(ctx, name)
	if err != nil {
		return nil, errors.Join(err, c.Abort())
	}
	return conn, nil
}

func (w *world) openUnix(addr, export string) (*client.Conn, error) {
	return w.open(endpoint{"unix", strings.TrimPrefix(addr, "unix:")}, export, false)
}

// wantReply opens an export, and requires a refusal with this reply and text; 0 is none.
func (w *world) wantReply(t *testing.T, at endpoint, vdi string, secure bool, reply wire.OptionReply, text string) {
	t.Helper()
	conn, err := w.open(at, w.export(vdi), secure)
	if reply == 0 {
		if err != nil {
			t.Errorf("TLS %v: %v", secure, err)
			return
		}
		conn.Close()
		return
	}
	var refused *client.Error
	if !errors.As(err, &refused) || refused.Reply != reply || !strings.Contains(refused.Text, text) {
		t.Errorf("TLS %v: got %v, want %v with %q", secure, err, reply, text)
	}
}

// reference returns the text of docs/REFERENCE.md.
func reference(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../../../../docs/REFERENCE.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
