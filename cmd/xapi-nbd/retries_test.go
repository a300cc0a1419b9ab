package main

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"xapi-nbd/cmd/xapi-nbd/internal/servicetest"
	"xapi-nbd/nbd/wire"
	"xapi-nbd/vdi"
	"xapi-nbd/xapi/xapitest"
)

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

// TestWaitsForTheStateFolder: a clean-up that has locked the state folder delays the service
// and does not end it. Refusals and systemd's status text have the reason.
func TestWaitsForTheStateFolder(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	s := servicetest.NewSystemd(t, w.dir)
	release := w.flock()
	p := w.launch()
	p.addr = p.waitAddr()
	s.Wait(`^READY=1\nSTATUS=waiting for the state folder;`)
	s.Wait(`^STATUS=waiting for the state folder; .*cannot lock the state folder: state folder is in use by another instance`)
	w.wantReply(t, p, vdi, false, wire.RepErrPolicy, "cannot use its state folder yet")
	p.waitLine("again_in=500ms")
	release()
	p.waitLine("ready to serve")
	s.Wait(`^STATUS=serving`)
	w.wantReply(t, p, vdi, false, 0, "")
	if got := w.report().Retries; len(got) != 0 {
		t.Errorf("still tried: %+v", got)
	}
	w.waitClean(p)
	if code := p.stop(patience); code != 0 {
		t.Errorf("exit code: got %d, want 0", code)
	}
}

// TestSecondInstance: a second instance with the same state folder waits. It ends by SIGTERM,
// and starts to serve when the first has ended.
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

// TestWaitsForAddresses: the service waits for addresses that are in use, or do not exist yet
// as at boot, and serves the others meanwhile.
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
		waits = append(waits, r.Action)
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

// TestSignalsRightAfterTheStart: SIGHUP does not end a service that has just started and has
// not read its settings yet.
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
	// The reload reads the file as well.
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
