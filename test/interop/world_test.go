package interop

import (
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"xapi-nbd/internal/testcert"
	"xapi-nbd/xapi/xapitest"
)

// diskSize is larger than several requests of every client, and than the buffers of sockets
// and relays.
const diskSize = 32 << 20

// world is a simulated host with the service.
type world struct {
	dir         string
	host        *xapitest.Host
	trust       string // folder with the ca-cert.pem of the service's certificate
	certificate string // the same in PEM
	service     *service
	args        []string // of the service, without the address
	sockets     int      // of the service without connections
	secrets     []string // of session refs, none of which the service may log
}

// newWorld starts a host and the service. On the host's network TLS is optional.
func newWorld(t *testing.T, settings ...string) *world {
	t.Helper()
	return newWorldOf(t, xapitest.Config{Style: xapitest.StyleSM}, settings...)
}

// newWorldOf is newWorld with a host of another kind.
func newWorldOf(t *testing.T, cfg xapitest.Config, settings ...string) *world {
	t.Helper()
	// Not t.TempDir, whose path may be too long for a unix socket.
	dir, err := os.MkdirTemp("", "xi")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	cfg.Dir = dir
	w := &world{dir: dir, trust: filepath.Join(dir, "trust")}
	if w.host, err = xapitest.Start(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.host.Close(); err != nil {
			t.Error(err)
		}
	})
	w.host.AddNetwork("insecure_nbd")
	pair := filepath.Join(dir, "xapi-ssl.pem")
	if w.certificate, err = makeCertificate(pair, w.trust); err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(dir, "xapi-nbd.toml")
	if err := os.WriteFile(config, []byte(strings.Join(settings, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // runs when the service has stopped
		logged := func(secret string) bool { return strings.Contains(w.service.log(), secret) }
		if w.service != nil && slices.ContainsFunc(w.secrets, logged) {
			t.Error("the log contains a session ref")
		}
	})
	w.args = []string{"serve", "--config=" + config, "--certfile=" + pair,
		"--xapi-socket=" + w.host.Socket(), "--inventory=" + w.host.Inventory(), "--device-dir=" + w.host.DeviceDir(),
		"--state-dir=" + w.stateDir(), "--log-level=debug"}
	w.start(t, "127.0.0.1:0")
	w.sockets = len(w.service.open("socket:"))
	return w
}

// start starts the service at an address.
func (w *world) start(t *testing.T, addr string) {
	t.Helper()
	w.service = startService(t, append(w.args, "--listen="+addr)...)
}

func (w *world) stateDir() string { return filepath.Join(w.dir, "state") }

// makeCertificate writes a self-signed certificate for localhost and 127.0.0.1, with its
// key to the file pair and alone into the folder trust, and returns it in PEM.
func makeCertificate(pair, trust string) (string, error) {
	cert := testcert.SelfSigned("localhost", "127.0.0.1")
	return string(cert.PEM()), errors.Join(cert.WriteServerFile(pair), cert.WriteCA(trust))
}

// randomBytes returns n bytes without runs of zeroes, the same for the same seed.
func randomBytes(seed uint64, n int) []byte {
	b := make([]byte, n)
	var key [32]byte
	key[0] = byte(seed)
	_, _ = mathrand.NewChaCha8(key).Read(b) // never fails
	return b
}

// addVDI adds a disk with that content and returns its uuid.
func (w *world) addVDI(t *testing.T, content []byte) string {
	t.Helper()
	f, err := os.CreateTemp(w.dir, "image")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return w.addImage(t, f.Name())
}

// addImage adds a disk with this file as its image and returns its uuid.
func (w *world) addImage(t *testing.T, path string) string {
	t.Helper()
	uuid, err := w.host.AddVDI(xapitest.VDISpec{Image: path})
	if err != nil {
		t.Fatal(err)
	}
	return uuid
}

// export returns an export name of the VDI with a new session.
func (w *world) export(vdi string) string {
	ref := w.host.NewSession(xapitest.RoleVMAdmin)
	w.secrets = append(w.secrets, strings.TrimPrefix(ref, "OpaqueRef:"))
	return w.host.ExportName(vdi, ref)
}

// settled waits until the service has released everything: no VBD on the host, no journal
// entry, no open image, no connection, and a log line about it. Then it removes the host's
// events and returns them.
func (w *world) settled(t *testing.T) []xapitest.Event {
	t.Helper()
	eventually(t, func() (bool, string) {
		vbds := w.host.VBDs()
		return len(vbds) == 0, fmt.Sprintf("VBDs on the host: %+v", vbds)
	})
	eventually(t, func() (bool, string) {
		journal, err := os.ReadFile(filepath.Join(w.stateDir(), "VBDs_to_clean_up"))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return false, err.Error()
		}
		return len(journal) == 0, "journal: " + string(journal)
	})
	eventually(t, func() (bool, string) {
		sockets := len(w.service.open("socket:"))
		return sockets <= w.sockets, fmt.Sprintf("sockets of the service: %d, at its start %d", sockets, w.sockets)
	})
	eventually(t, func() (bool, string) { // the log comes through a pipe
		log := w.service.log()
		connected := strings.Count(log, "msg=connected ")
		ended := strings.Count(log, `msg="handshake ended`) + strings.Count(log, `msg="transmission ended`)
		return connected == ended, fmt.Sprintf("the log has %d connections, and %d that ended", connected, ended)
	})
	if images := w.service.open(filepath.Join(w.dir, "image")); len(images) != 0 {
		t.Errorf("images still open: %q", images)
	}
	events := w.host.Events()
	w.host.ResetEvents()
	return events
}

// mostVBDs returns the largest number of VBDs at one time. It fails the test for each VBD
// that was not created, plugged, unplugged and destroyed.
func mostVBDs(t *testing.T, events []xapitest.Event) (most int) {
	t.Helper()
	changes := map[string][]string{}
	now := 0
	for _, e := range events {
		changes[e.VBD] = append(changes[e.VBD], e.Change)
		switch e.Change {
		case "created":
			now++
			most = max(most, now)
		case "destroyed":
			now--
		}
	}
	for vbd, life := range changes {
		if got := strings.Join(life, " "); got != "created plugged unplugged destroyed" {
			t.Errorf("life of VBD %s: got %s, want created plugged unplugged destroyed", vbd, got)
		}
	}
	return most
}
