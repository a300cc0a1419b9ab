package servicetest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"xapi-nbd/internal/testcert"
	"xapi-nbd/nbd/client"
	"xapi-nbd/xapi/xapitest"
)

// World is a simulated host with a network and certificates, in a folder of its own. Its
// methods fail the test on errors, except for Dial and Open.
type World struct {
	Dir     string
	Host    *xapitest.Host
	Network string // uuid of the network, whose purpose is insecure_nbd
	Trust   *testcert.Files

	t       *testing.T
	secrets []string // session refs that must not appear in any output
}

// NewWorld makes a world until the end of the test. It sets cfg.Dir.
func NewWorld(t *testing.T, cfg xapitest.Config) *World {
	t.Helper()
	// Not t.TempDir: the path of a unix socket is short.
	dir, err := os.MkdirTemp("", "xn")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	cfg.Dir = dir
	w := &World{t: t, Dir: dir}
	if w.Host, err = xapitest.Start(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Host.Close(); err != nil {
			t.Error(err)
		}
	})
	w.Network = w.Host.AddNetwork("insecure_nbd")
	if w.Trust, err = testcert.NewFiles(dir); err != nil {
		t.Fatal(err)
	}
	return w
}

// File writes a file in the folder of the world and returns its path.
func (w *World) File(name, text string) string {
	w.t.Helper()
	path := filepath.Join(w.Dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
	return path
}

// AddVDI adds a disk whose content is data. The names of images begin with "image".
func (w *World) AddVDI(data []byte, spec xapitest.VDISpec) (uuid string) {
	w.t.Helper()
	f, err := os.CreateTemp(w.Dir, "image")
	if err != nil {
		w.t.Fatal(err)
	}
	if _, err := f.Write(data); err != nil {
		w.t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		w.t.Fatal(err)
	}
	spec.Image = f.Name()
	if uuid, err = w.Host.AddVDI(spec); err != nil {
		w.t.Fatal(err)
	}
	return uuid
}

// Session returns the ref of a new session, which WantNoSecrets looks for.
func (w *World) Session(role xapitest.Role) string {
	ref := w.Host.NewSession(role)
	w.secrets = append(w.secrets, ref, strings.TrimPrefix(ref, "OpaqueRef:"))
	return ref
}

// Export returns an export name for a VDI, with a new session that may plug it.
func (w *World) Export(vdi string) string {
	return w.Host.ExportName(vdi, w.Session(xapitest.RoleVMAdmin))
}

// WantNoSecrets requires that a text contains no ref of Session. The name of the text is for
// the message.
func (w *World) WantNoSecrets(name, text string) {
	w.t.Helper()
	for _, secret := range w.secrets {
		if strings.Contains(text, secret) {
			w.t.Errorf("%s contains a session ref:\n%s", name, text)
		}
	}
}

// Dial connects to a service, with TLS if secure is true. The caller ends the client.
func (w *World) Dial(network, addr string, secure bool, cfg client.Config) (*client.Client, error) {
	ctx, cancel := context.WithTimeout(w.t.Context(), Timeout)
	defer cancel()
	if secure {
		cfg.TLSConfig = w.Trust.Client
	}
	return client.Dial(ctx, network, addr, &cfg)
}

// Open connects to a service and opens an export. The caller closes the connection.
func (w *World) Open(network, addr, name string, secure bool, cfg client.Config) (*client.Conn, error) {
	c, err := w.Dial(network, addr, secure, cfg)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(w.t.Context(), Timeout)
	defer cancel()
	conn, err := c.Go(ctx, name)
	if err != nil {
		return nil, errors.Join(err, c.Abort())
	}
	return conn, nil
}
