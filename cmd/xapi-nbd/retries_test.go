package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/nbd/wire"
	"xapi-nbd/vdi"
	"xapi-nbd/xapi/xapitest"
)

// The pauses between attempts grow up to a limit, and what is being tried is
// reported until it succeeds.
func TestRetriesGrow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRetries(slog.New(slog.DiscardHandler), nil)
		var pauses []time.Duration
		last := time.Now()
		failed := errors.New("not there")
		err := r.again(t.Context(), "do it", failed, func(context.Context) error {
			pauses = append(pauses, time.Since(last))
			last = time.Now()
			got := r.report()
			if len(got) != 1 || got[0].What != "do it" || got[0].LastError != "not there" || got[0].Attempts != len(pauses) {
				t.Errorf("attempt %d: got %+v", len(pauses)+1, got)
			}
			if len(pauses) < 9 {
				return failed
			}
			return nil
		})
		want := []time.Duration{
			firstPause, 2 * firstPause, 4 * firstPause, 8 * firstPause, 16 * firstPause, 32 * firstPause,
			longestPause, longestPause, longestPause,
		}
		if err != nil || !slices.Equal(pauses, want) {
			t.Errorf("got %v, %v, want pauses %v", err, pauses, want)
		}
		if got := r.report(); len(got) != 0 {
			t.Errorf("afterwards: got %+v", got)
		}
		if err := r.again(t.Context(), "do it", failed, func(context.Context) error { return &kindError{ErrStateFolder, failed} }); err == nil {
			t.Error("a permanent error is no error")
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := r.again(ctx, "do it", failed, nil); !errors.Is(err, context.Canceled) {
			t.Errorf("an ended context: got %v", err)
		}
	})
}

// Which addresses are tried again, and which are an administrator's mistake.
func TestListenErrors(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	socket, err := net.Listen("unix", filepath.Join(w.dir, "busy"))
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	for _, tt := range []struct {
		addr  string
		never bool
	}{
		{busy.Addr().String(), false},
		{"192.0.2.1:10809", false}, // an address of no interface
		{"[fe80::1%nosuch0]:10809", false},
		{"unix:" + socket.Addr().String(), false},
		{"unix:" + w.dir + "/missing/socket", false},
		{"unix:" + w.dir, true},
		{"unix:" + w.file("file", ""), true},
		{"unix:" + w.file("file", "") + "/socket", true},
		{"unix:" + w.dir + "/" + strings.Repeat("long", 50), true},
		{"[fe80::1]:10809", true}, // without a zone
	} {
		l, err := listenOn(t.Context(), tt.addr)
		if err == nil {
			l.Close()
			t.Errorf("%s can be listened on", tt.addr)
			continue
		}
		if never := errors.Is(err, ErrListen); never != tt.never {
			t.Errorf("%s: never %v, want %v: %v", tt.addr, never, tt.never, err)
		}
	}
}

// flock holds the lock of a world's state folder, as a clean-up does.
func (w *world) flock() (release func()) {
	w.t.Helper()
	dir := filepath.Join(w.dir, "state")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		w.t.Fatal(err)
	}
	f, err := os.Create(vdi.LockPath(dir))
	if err == nil {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		w.t.Fatal(err)
	}
	return func() { f.Close() }
}

// A clean-up that has the state folder for a while holds the service up and does
// not end it. Clients learn why they are refused, and so does systemd.
func TestWaitsForTheStateFolder(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	s := newSystemd(t, w)
	release := w.flock()
	p := w.launch()
	p.addr = p.waitAddr()
	s.wait(`^READY=1\nSTATUS=waiting for the state folder;`)
	s.wait(`^STATUS=waiting for the state folder; .*cannot lock the state folder: state folder is in use by another instance`)
	w.wantReply(t, p, vdi, false, wire.RepErrPolicy, "cannot use its state folder yet")
	p.waitLine("again_in=500ms")
	release()
	p.waitLine("ready to serve")
	s.wait(`^STATUS=serving`)
	w.wantReply(t, p, vdi, false, 0, "")
	if got := w.report().Retries; len(got) != 0 {
		t.Errorf("still tried: %+v", got)
	}
	w.waitClean(p)
	if code := p.stop(patience); code != 0 {
		t.Errorf("exit code: got %d, want 0", code)
	}
}

// A second instance on one state folder would undo the first one's work. It
// waits, ends when it is told to, and takes over when the first has ended.
func TestSecondInstance(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	first := w.start()
	second := w.launch()
	second.waitLine("in use by another instance")
	if code := second.stop(patience); code != 0 {
		t.Errorf("stopped while it waits: exit code %d, want 0", code)
	}
	third := w.launch()
	third.waitLine("in use by another instance")
	if got := w.report(); got.PID != first.cmd.Process.Pid {
		t.Errorf("status is answered by process %d, want the first instance", got.PID)
	}
	first.kill()
	third.waitLine("ready to serve")
	if got := w.report(); got.PID != third.cmd.Process.Pid {
		t.Errorf("status is answered by process %d, want the one that took over", got.PID)
	}
}

// Addresses that are busy, or not there yet as at boot, are waited for. The others
// are served meanwhile.
func TestWaitsForAddresses(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	addr := busy.Addr().String()
	folder := filepath.Join(w.dir, "later")
	scrapeAt := "unix:" + w.dir + "/metrics"
	p := w.start("--listen="+addr, "--listen=192.0.2.1:10809", "--listen=unix:"+folder+"/socket",
		"--config="+w.file("metrics.toml", `metrics = "`+scrapeAt+`"`))
	w.wantReply(t, p, vdi, false, 0, "")
	var waits []string
	for _, r := range w.report().Retries {
		waits = append(waits, r.What)
	}
	for _, what := range []string{"listen " + addr, "listen 192.0.2.1:10809", "listen unix:" + folder + "/socket"} {
		if !slices.Contains(waits, what) {
			t.Errorf("the status does not say %q: %q", what, waits)
		}
	}
	waitMetrics(t, scrapeAt, `xapi_nbd_retries_pending 3`, `xapi_nbd_log_lines_dropped_total 0`)
	w.waitScreen("listen "+addr, "listen 192.0.2.1:10809", "cannot assign requested address")
	busy.Close()
	if err := os.Mkdir(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	p.waitLine("listening on " + addr)
	p.waitLine("listening on " + folder + "/socket")
	p.addr = addr
	w.wantReply(t, p, vdi, false, 0, "")
	w.waitClean(p)
	if code := p.stop(patience); code != 0 {
		t.Errorf("exit code: got %d, want 0", code)
	}
}

// A reload forgets an address that was waited for, and may wait for one again that
// it had to close for nothing.
func TestReloadWhileAddressesAreWaitedFor(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	addr := busy.Addr().String()
	s := w.inside(func(c *config.Config) { c.Listen = []string{"127.0.0.1:0", addr} })
	s.reloadWith(func(c *config.Config) { c.MaxVBDs = 3 }) // the one that is waited for is in nobody's way
	if got := s.service.settings.Load().MaxVBDs; got != 3 || len(s.retries.report()) != 1 {
		t.Errorf("max_vbds is %d, waiting: %+v\n%s", got, s.retries.report(), s.logged())
	}
	s.reloadWith(func(c *config.Config) { c.Listen = []string{"127.0.0.1:0"} })
	eventually(t, func() string {
		if left := s.retries.report(); len(left) > 0 {
			return "still waiting for " + left[0].What
		}
		return ""
	})
	busy.Close()
	s.reloadWith(func(c *config.Config) { c.Listen = []string{"127.0.0.1:0", addr} })
	if got := s.listening.addrs(); len(got) != 2 || got[1].String() != addr {
		t.Errorf("got %v, want %s as well\n%s", got, addr, s.logged())
	}
}

// A listener that somebody closes is opened again.
func TestListenerThatFails(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	socket := "unix:" + w.dir + "/socket"
	s := w.inside(func(c *config.Config) { c.Listen = []string{socket} })
	s.listening.open[0].Close()
	eventually(t, func() string {
		conn, err := w.openUnix(socket, w.export(vdi))
		if err != nil {
			return err.Error()
		}
		conn.Close()
		return ""
	})
}

// A service that has been started a moment ago is not killed by SIGHUP: here it
// has not even read its settings.
func TestSignalsRightAfterTheStart(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	fifo := filepath.Join(w.dir, "settings.toml")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	p := w.launch("--config=" + fifo)
	settings, err := os.OpenFile(fifo, os.O_WRONLY, 0) // waits until the service reads
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	// The reload that the signal asks for reads the file as well.
	if err := os.Rename(w.file("new.toml", ""), fifo); err != nil {
		t.Fatal(err)
	}
	settings.Close()
	p.waitLine("ready to serve")
	p.waitLine("configuration reloaded")
	if code := p.stop(patience); code != 0 {
		t.Errorf("exit code: got %d, want 0", code)
	}
}
