package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/cmd/xapi-nbd/internal/logging"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
	"xapi-nbd/xapi/xapitest"
)

// insideService is a service in the test's own process.
type insideService struct {
	*service
	w *world

	mu   sync.Mutex    // guards what follows
	next config.Config // what a reload reads
	fail error         // or fails with
	log  bytes.Buffer
}

// Write implements io.Writer, for the log.
func (s *insideService) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.Write(p)
}

func (s *insideService) logged() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.String()
}

// settings are those of w.args.
func (w *world) settings(change func(*config.Config)) config.Config {
	cfg := config.Default()
	cfg.Listen = []string{"127.0.0.1:0"}
	cfg.Certfile = w.trust.serverFile
	cfg.XapiSocket, cfg.Inventory, cfg.DeviceDir = w.host.Socket(), w.host.Inventory(), w.host.DeviceDir()
	cfg.StateDir = filepath.Join(w.dir, "state")
	if change != nil {
		change(&cfg)
	}
	return cfg
}

// make makes a service that is not run.
func (w *world) make(change func(*config.Config)) *insideService {
	w.t.Helper()
	s := &insideService{w: w, next: w.settings(change)}
	level := new(slog.LevelVar)
	log, always := logging.New(level, s.next, s)
	var err error
	read := func() (config.Config, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.next, s.fail
	}
	o := Options{Config: s.next, Log: log, Always: always, Reloading: Reloading{Read: read, Level: level}}
	if s.service, err = newService(w.t.Context(), o); err != nil {
		w.t.Fatal(err)
	}
	return s
}

// inside runs a service until the end of the test; it has met xapi. Its log holds
// no session.
func (w *world) inside(change func(*config.Config)) *insideService {
	w.t.Helper()
	s := w.make(change)
	stop, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.run(stop, context.Background()) }()
	w.t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			w.t.Error(err)
		}
		w.wantNoSecrets("the log", s.logged())
	})
	select {
	case <-s.ready:
	case <-time.After(patience):
		w.t.Fatal("the service does not meet xapi")
	}
	return s
}

// reloadWith reloads with other settings.
func (s *insideService) reloadWith(change func(*config.Config)) {
	s.w.t.Helper()
	s.mu.Lock()
	change(&s.next)
	s.mu.Unlock()
	s.reload(s.w.t.Context())
}

// at is a stand-in for a process that listens at an address.
func (s *insideService) at(n int) *process {
	return &process{t: s.w.t, addr: s.listening.addrs()[n].String()}
}

// A hundred reloads, each with other settings, while clients read: no read fails.
func TestReloadUnderLoad(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	image := random(5, 1<<20)
	vdi := w.addVDI(image, xapitest.VDISpec{})
	file := w.file("reload.toml", "")
	p := w.start("--config=" + file)
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for i := range 4 {
		conn, err := w.open(p, w.export(vdi), i%2 == 0)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		readers.Go(func() {
			got := make([]byte, len(image))
			for !isClosed(stop) {
				if _, err := conn.ReadAt(got, 0); err != nil || !bytes.Equal(got, image) {
					t.Errorf("a read failed: %v", err)
					return
				}
			}
		})
	}
	for i := range 100 {
		text := fmt.Sprintf("max_connections = %d\nmax_vbds = %d\nmax_inflight_bytes = \"%d MiB\"\nidle_timeout = \"%dm\"\nrate_limit = \"%d GiB\"\n",
			10+i%2, 3+i%3, 8+i%5, 1+i%7, i%2)
		if err := os.Rename(w.file("new.toml", text), file); err != nil {
			t.Fatal(err)
		}
		if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		p.waitLines("configuration reloaded", i+1)
	}
	if r := w.report(); r.Limits.MaxConnections != 11 || r.Limits.MaxVBDs != 3 || r.Limits.MaxInflightBytes != 12<<20 || r.Limits.RateLimit != 1<<30 {
		t.Errorf("limits after the last reload: got %+v", r.Limits)
	}
	close(stop)
	readers.Wait()
	if n := len(w.report().Connections); n != 4 {
		t.Errorf("got %d connections, want the 4 that there were", n)
	}
}

// waitLines waits until a text was logged n times.
func (p *process) waitLines(what string, n int) {
	p.t.Helper()
	deadline := time.Now().Add(patience)
	defer time.AfterFunc(patience, p.lines.Broadcast).Stop()
	p.mu.Lock()
	defer p.mu.Unlock()
	for strings.Count(p.text.String(), what) < n {
		if p.eof || time.Now().After(deadline) {
			p.t.Fatalf("the service did not say %q %d times:\n%s", what, n, p.text.String())
		}
		p.lines.Wait()
	}
}

// A broken file changes nothing, and the log says what is wrong and where.
func TestReloadBrokenFile(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	file := w.file("reload.toml", "max_vbds = 7\n")
	p := w.start("--config=" + file)
	tests := []struct {
		text string
		want []string // all in one line of the log
	}{
		{"max_vbds = 8\nmax_vdbs = 8\n", []string{"line 2", "max_vdbs"}},
		{"max_vbds = 8\n\nidle_timeout = 30\n", []string{"line 3", "idle_timeout"}},
		{"max_vbds = 8\nmax_connections = 0\n", []string{"line 2", "max_connections must be at least 1"}},
		{"max_vbds = 8\nmetrics = \n", []string{"line 2"}},
		{"max_vbds = 8\ntls = \"maybe\"\n", []string{"line 2", "tls must be"}},
		{"max_vbds = 8\nrate_limit = 5\n", []string{"line 2", "rate_limit"}},
	}
	for i, tt := range tests {
		if err := os.Rename(w.file("new.toml", tt.text), file); err != nil {
			t.Fatal(err)
		}
		if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		p.waitLines("configuration not reloaded", i+1)
		last := ""
		for line := range strings.Lines(p.output()) {
			if strings.Contains(line, "configuration not reloaded") {
				last = line
			}
		}
		for _, want := range tt.want {
			if !strings.Contains(last, want) {
				t.Errorf("%q: the log does not say %q: %s", tt.text, want, last)
			}
		}
	}
	if got := w.report().Limits.MaxVBDs; got != 7 {
		t.Errorf("max_vbds: got %d, want 7 as before", got)
	}
	w.wantReply(t, p, vdi, false, 0, "")
	w.waitClean(p)
}

// Limits and the log's level hold from now on, and what needs a restart says so.
func TestReloadSettings(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	s := w.inside(nil)
	conn, err := w.open(s.at(0), w.export(vdi), true)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	s.reloadWith(func(c *config.Config) {
		c.MaxConnections, c.LogLevel, c.StateDir = 1, "debug", "/elsewhere"
		c.RateLimit, c.RateLimitVDI = 1<<40, 1<<40
	})
	if _, err := w.open(s.at(0), w.export(vdi), false); err == nil || !strings.Contains(err.Error(), "max_connections is 1") {
		t.Errorf("a second connection: got %v, want the new limit", err)
	}
	for _, want := range []string{`changed="[max_connections log_level rate_limit rate_limit_vdi]"`, `keys="[state_dir]"`, "level=debug"} {
		if !strings.Contains(s.logged(), want) {
			t.Errorf("the log lacks %s:\n%s", want, s.logged())
		}
	}
	if got := s.service.settings.Load().StateDir; got == "/elsewhere" {
		t.Error("the state folder has changed")
	}
	s.fail = errors.New("unreadable")
	s.reloadWith(func(c *config.Config) { c.MaxConnections = 2 })
	if got := s.service.settings.Load().MaxConnections; got != 1 {
		t.Errorf("after a failed reload: got max_connections %d, want 1", got)
	}
	if _, err := conn.ReadAt(make([]byte, 1<<20), 0); err != nil {
		t.Errorf("the connection from before: %v", err)
	}
}

// New addresses are opened, old ones closed, those that stay are left alone, and
// connections go on wherever they came in.
func TestReloadListen(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	first, second := "unix:"+w.dir+"/1.sock", "unix:"+w.dir+"/2.sock"
	s := w.inside(func(c *config.Config) { c.Listen = []string{"127.0.0.1:0", first} })
	stays := s.at(0)
	old, err := w.openUnix(first, w.export(vdi))
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	s.reloadWith(func(c *config.Config) { c.Listen = []string{second, "127.0.0.1:0"} })
	if got := s.listening.addrs(); len(got) != 2 || got[0].String() != stays.addr {
		t.Errorf("got %v, want %s to stay", got, stays.addr)
	}
	if _, err := w.openUnix(first, w.export(vdi)); err == nil {
		t.Error("the old address still answers")
	}
	for range 2 {
		conn, err := w.openUnix(second, w.export(vdi))
		if err != nil {
			t.Fatalf("the new address: %v", err)
		}
		conn.Close()
		w.wantReply(t, stays, vdi, true, 0, "")
		// An address that cannot be had changes nothing at all.
		s.reloadWith(func(c *config.Config) { c.Listen, c.MaxVBDs = []string{"unix:/nonexistent/socket"}, 3 })
		if got := s.service.settings.Load().MaxVBDs; got != 16 {
			t.Errorf("max_vbds: got %d, want 16 as before", got)
		}
	}
	if _, err := old.ReadAt(make([]byte, 1<<20), 0); err != nil {
		t.Errorf("the connection through the address that has gone: %v", err)
	}
}

// From all addresses of a port to one of them, and back: the one that goes stands
// in the way of the one that comes.
func TestReloadListenOnTheSamePort(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
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
		w.wantReply(t, &process{t: t, addr: addr}, vdi, false, 0, "")
	}
	// What was closed to make room comes back when there is none after all.
	s.reloadWith(func(c *config.Config) { c.Listen = []string{wide, taken} })
	if got := s.listening.addrs(); len(got) != 1 || got[0].String() != addr {
		t.Fatalf("got %v, want %s back\n%s", got, addr, s.logged())
	}
	w.wantReply(t, &process{t: t, addr: addr}, vdi, false, 0, "")
}

func (w *world) openUnix(addr, export string) (*client.Conn, error) {
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	c, err := client.Dial(ctx, "unix", strings.TrimPrefix(addr, "unix:"), nil)
	if err != nil {
		return nil, err
	}
	conn, err := c.Go(ctx, export)
	if err != nil {
		return nil, errors.Join(err, c.Abort())
	}
	return conn, nil
}

// Another certfile, and another decision about TLS, are for those who come.
func TestReloadTLS(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	s := w.inside(nil)
	old, err := w.open(s.at(0), w.export(vdi), true)
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	dir := filepath.Join(w.dir, "other")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	other, err := newDemoCertificate(dir)
	if err != nil {
		t.Fatal(err)
	}
	s.reloadWith(func(c *config.Config) { c.Certfile, c.TLS = w.file("bad.pem", "nonsense"), config.TLSRequire })
	w.wantReply(t, s.at(0), vdi, true, 0, "")
	w.wantReply(t, s.at(0), vdi, false, 0, "")
	s.reloadWith(func(c *config.Config) { c.Certfile = other.serverFile })
	if _, err := w.open(s.at(0), w.export(vdi), true); err == nil {
		t.Error("the old certificate is still shown")
	}
	w.trust = other
	w.wantReply(t, s.at(0), vdi, true, 0, "")
	w.wantReply(t, s.at(0), vdi, false, wire.RepErrTLSReqd, "")
	s.reloadWith(func(c *config.Config) { c.Certfile, c.TLS = "", config.TLSOff })
	w.wantReply(t, s.at(0), vdi, false, 0, "")
	w.wantReply(t, s.at(0), vdi, true, wire.RepErrPolicy, "")
	if _, err := old.ReadAt(make([]byte, 1<<20), 0); err != nil {
		t.Errorf("the connection from before: %v", err)
	}
}

// Sessions of TLS are resumed through settings that can be replaced, and not
// beyond their replacement.
func TestTLSSessionsAreResumed(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	s := w.inside(nil)
	w.trust.client = w.trust.client.Clone()
	w.trust.client.ClientSessionCache = tls.NewLRUClientSessionCache(1)
	resumed := func() bool {
		c, err := w.dial(s.at(0), true)
		if err != nil {
			t.Fatal(err)
		}
		state := c.TLS().DidResume
		conn, err := c.Go(t.Context(), w.export(vdi)) // its answer brings the ticket
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		return state
	}
	if resumed() || !resumed() {
		t.Error("the second session was not a resumed one, or the first was")
	}
	again := w.file("again.pem", "")
	pem, err := os.ReadFile(w.trust.serverFile)
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
