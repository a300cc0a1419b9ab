package main

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"xapi-nbd/cmd/xapi-nbd/internal/servicetest"
	"xapi-nbd/xapi/xapitest"
)

func TestNotify(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	s := servicetest.NewSystemd(t, w.dir)
	t.Setenv("WATCHDOG_USEC", "3000000") // three times as often the status text is brought up to date
	t.Setenv("WATCHDOG_PID", "")
	p := w.start()
	s.Wait(`^READY=1\n`)
	if code, _, errOut := w.status(); code != 0 { // at once
		t.Errorf("status after READY=1: exit code %d, %s", code, errOut)
	}
	s.Wait(`^STATUS=serving`)
	s.Wait(`^WATCHDOG=1$`)
	conn, err := w.open(p, w.export(vdi), false)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	s.Wait(`^STATUS=serving; connections: 1, attached VDIs: 1$`)
	s.Wait(`^WATCHDOG=1$`)
	if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	s.Wait(`^RELOADING=1\nMONOTONIC_USEC=[1-9][0-9]*\n$`)
	s.Wait(`^READY=1$`)
	if code, _, _ := w.status("--drain"); code != 0 {
		t.Errorf("status --drain: exit code %d", code)
	}
	s.Wait(`^STATUS=draining; connections: 1`)
	if code := p.stop(patience); code != 0 {
		t.Errorf("exit code: got %d, want 0", code)
	}
	s.Wait(`^STOPPING=1$`)
}

// TestSocketActivation: sockets that systemd passes replace the addresses of the settings.
func TestSocketActivation(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w.childFiles = []*os.File{f}
	t.Setenv("LISTEN_FDS", "1")
	p := w.start()
	if p.addr != l.Addr().String() {
		t.Errorf("listens on %s, want %s", p.addr, l.Addr())
	}
	w.wantReply(t, p, vdi, true, 0, "")
	if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	p.waitLine("configuration reloaded")
	w.wantReply(t, p, vdi, false, 0, "")
	w.waitClean(p)
	if n := strings.Count(p.output(), "listening on "); n != 1 {
		t.Errorf("listens on %d addresses, want 1:\n%s", n, p.output())
	}

	// A descriptor that is not a listening socket is refused.
	w.childFiles = []*os.File{mustOpen(t, os.DevNull)}
	bad := w.launch("--state-dir=" + filepath.Join(w.dir, "other"))
	<-bad.ended
	if code := bad.cmd.ProcessState.ExitCode(); code != exitBind || !strings.Contains(bad.output(), "descriptor 3") {
		t.Errorf("exit code %d:\n%s", code, bad.output())
	}
}

func mustOpen(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}
