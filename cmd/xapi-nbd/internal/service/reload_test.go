package service

import (
	"crypto/tls"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/internal/testcert"
	"xapi-nbd/nbd/wire"
	"xapi-nbd/xapi/xapitest"
)

// TestReloadSettings: limits and log level change at once, and the log names settings that
// need a restart.
func TestReloadSettings(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.AddVDI(random(1, 1<<20), xapitest.VDISpec{})
	s := w.inside(nil)
	conn, err := w.open(s.at(0), w.Export(vdi), true)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	s.reloadWith(func(c *config.Config) {
		c.MaxConnections, c.LogLevel, c.StateDir = 1, "debug", "/elsewhere"
		c.RateLimit, c.RateLimitVDI = 1<<40, 1<<40
	})
	if _, err := w.open(s.at(0), w.Export(vdi), false); err == nil || !strings.Contains(err.Error(), "max_connections is 1") {
		t.Errorf("a second connection: got %v, want the new limit", err)
	}
	for _, want := range []string{`changed="[max_connections log_level rate_limit rate_limit_vdi]"`, `keys="[state_dir]"`, "level=debug"} {
		if !strings.Contains(s.logged(), want) {
			t.Errorf("the log lacks %s:\n%s", want, s.logged())
		}
	}
	if got := s.Service.settings.Load().StateDir; got == "/elsewhere" {
		t.Error("the state folder has changed")
	}
	s.fail = errors.New("unreadable")
	s.reloadWith(func(c *config.Config) { c.MaxConnections = 2 })
	if got := s.Service.settings.Load().MaxConnections; got != 1 {
		t.Errorf("after a failed reload: got max_connections %d, want 1", got)
	}
	if _, err := conn.ReadAt(make([]byte, 1<<20), 0); err != nil {
		t.Errorf("the connection from before: %v", err)
	}
}

// TestReloadListen: new addresses are opened, removed ones closed, the others left alone.
// Connections go on, also those of closed addresses.
func TestReloadListen(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.AddVDI(random(1, 1<<20), xapitest.VDISpec{})
	first, second := "unix:"+w.dir+"/1.sock", "unix:"+w.dir+"/2.sock"
	s := w.inside(func(c *config.Config) { c.Listen = []string{"127.0.0.1:0", first} })
	stays := s.at(0)
	old, err := w.openUnix(first, w.Export(vdi))
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	s.reloadWith(func(c *config.Config) { c.Listen = []string{second, "127.0.0.1:0"} })
	if got := s.listening.addrs(); len(got) != 2 || got[0].String() != stays.addr {
		t.Errorf("got %v, want %s to stay", got, stays.addr)
	}
	if _, err := w.openUnix(first, w.Export(vdi)); err == nil {
		t.Error("the old address still answers")
	}
	for range 2 {
		conn, err := w.openUnix(second, w.Export(vdi))
		if err != nil {
			t.Fatalf("the new address: %v", err)
		}
		conn.Close()
		w.wantReply(t, stays, vdi, true, 0, "")
		// An address that cannot be opened changes nothing.
		s.reloadWith(func(c *config.Config) { c.Listen, c.MaxVBDs = []string{"unix:/nonexistent/socket"}, 3 })
		if got := s.Service.settings.Load().MaxVBDs; got != 16 {
			t.Errorf("max_vbds: got %d, want 16 as before", got)
		}
	}
	if _, err := old.ReadAt(make([]byte, 1<<20), 0); err != nil {
		t.Errorf("the connection through the address that has gone: %v", err)
	}
}

// TestReloadListenOnTheSamePort changes from all addresses of a port to one of them, and back:
// the new one can be opened only after the old one is closed.
func TestReloadListenOnTheSamePort(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.AddVDI(random(1, 1<<20), xapitest.VDISpec{})
	// The port has to be free on all addresses, so the kernel is asked for such a one.
	s := w.inside(func(c *config.Config) { c.Listen = []string{"0.0.0.0:0"} })
	port := ":" + strconv.Itoa(s.listening.addrs()[0].(*net.TCPAddr).Port)
	addr, wide := "127.0.0.1"+port, "0.0.0.0"+port
	taken := "unix:" + w.dir // a folder
	for _, listen := range [][]string{{addr}, {wide}, {addr}} {
		s.reloadWith(func(c *config.Config) { c.Listen = listen })
		if got := s.listening.open; len(got) != 1 || got[0].addr != listen[0] || !strings.HasSuffix(got[0].Addr().String(), port) {
			t.Fatalf("got %v, want %q\n%s", s.listening.addrs(), listen, s.logged())
		}
		w.wantReply(t, endpoint{"tcp", addr}, vdi, false, 0, "")
	}
	// Addresses that were closed to make room are opened again when the new ones fail.
	s.reloadWith(func(c *config.Config) { c.Listen = []string{wide, taken} })
	if got := s.listening.addrs(); len(got) != 1 || got[0].String() != addr {
		t.Fatalf("got %v, want %s back\n%s", got, addr, s.logged())
	}
	w.wantReply(t, endpoint{"tcp", addr}, vdi, false, 0, "")
}

// TestReloadTLS: a new certfile and a new value of tls apply to new connections.
func TestReloadTLS(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.AddVDI(random(1, 1<<20), xapitest.VDISpec{})
	s := w.inside(nil)
	old, err := w.open(s.at(0), w.Export(vdi), true)
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	dir := filepath.Join(w.dir, "other")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	other, err := testcert.NewFiles(dir)
	if err != nil {
		t.Fatal(err)
	}
	s.reloadWith(func(c *config.Config) { c.Certfile, c.TLS = w.File("bad.pem", "nonsense"), config.TLSRequire })
	w.wantReply(t, s.at(0), vdi, true, 0, "")
	w.wantReply(t, s.at(0), vdi, false, 0, "")
	s.reloadWith(func(c *config.Config) { c.Certfile = other.Server })
	if _, err := w.open(s.at(0), w.Export(vdi), true); err == nil {
		t.Error("the old certificate is still shown")
	}
	w.Trust = other
	w.wantReply(t, s.at(0), vdi, true, 0, "")
	w.wantReply(t, s.at(0), vdi, false, wire.RepErrTLSReqd, "")
	s.reloadWith(func(c *config.Config) { c.Certfile, c.TLS = "", config.TLSOff })
	w.wantReply(t, s.at(0), vdi, false, 0, "")
	w.wantReply(t, s.at(0), vdi, true, wire.RepErrPolicy, "")
	if _, err := old.ReadAt(make([]byte, 1<<20), 0); err != nil {
		t.Errorf("the connection from before: %v", err)
	}
}

// TestTLSSessionsAreResumed: TLS sessions are resumed until a reload changes the settings of
// TLS.
func TestTLSSessionsAreResumed(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.AddVDI(random(1, 1<<20), xapitest.VDISpec{})
	s := w.inside(nil)
	w.Trust.Client = w.Trust.Client.Clone()
	w.Trust.Client.ClientSessionCache = tls.NewLRUClientSessionCache(1)
	resumed := func() bool {
		c, err := w.dial(s.at(0), true)
		if err != nil {
			t.Fatal(err)
		}
		state := c.TLS().DidResume
		conn, err := c.Go(t.Context(), w.Export(vdi)) // its answer brings the ticket
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		return state
	}
	if resumed() || !resumed() {
		t.Error("the second session was not a resumed one, or the first was")
	}
	again := w.File("again.pem", "")
	pem, err := os.ReadFile(w.Trust.Server)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(again, pem, 0o600); err != nil {
		t.Fatal(err)
	}
	s.reloadWith(func(c *config.Config) { c.Certfile = again })
	if resumed() {
		t.Error("a session was resumed with the keys of another file")
	}
}
