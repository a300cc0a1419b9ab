package main

import (
	"errors"
	"strings"
	"syscall"
	"testing"

	"xapi-nbd/cmd/xapi-nbd/internal/control"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
	"xapi-nbd/xapi/xapitest"
)

// TestStatusDrain: a draining service refuses new clients, serves the others, and then ends.
func TestStatusDrain(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	p := w.start()
	conn, err := w.open(p, w.export(vdi), false)
	if err != nil {
		t.Fatal(err)
	}
	early, err := w.dial(p, false) // has its TLS mode already
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if code, out, errOut := w.status("--drain"); code != 0 || !strings.Contains(out, "may finish: 1") {
			t.Errorf("got exit code %d, %q, %q", code, out, errOut)
		}
	}
	w.wantRefused(t, early, w.export(vdi), wire.RepErrShutdown, "")
	_, err = w.dial(p, false)
	var refused *client.Error
	if !errors.As(err, &refused) || refused.Reply != wire.RepErrShutdown {
		t.Errorf("a new client: got %v, want %v", err, wire.RepErrShutdown)
	}
	if _, answer := w.exportName(p, w.export(vdi)); len(answer) != 0 {
		t.Errorf("EXPORT_NAME: got %x, want the end of the connection", answer)
	}
	if r := w.report(); r.State != control.StateDraining || r.Refused["draining"] != 3 {
		t.Errorf("got state %q and refusals %v", r.State, r.Refused)
	}
	if _, err := conn.ReadAt(make([]byte, 4096), 0); err != nil {
		t.Errorf("whoever is served: %v", err)
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	if code := p.exitCode(patience, "status --drain"); code != 0 {
		t.Errorf("exit code: got %d, want 0", code)
	}
	w.waitClean(p)
}

// TestStatusDrainAtRest: without connections the service ends at once, after it has answered.
func TestStatusDrainAtRest(t *testing.T) {
	for range 5 {
		w := newWorld(t, xapitest.Config{})
		p := w.start()
		if code, out, errOut := w.status("--drain"); code != 0 || !strings.Contains(out, "may finish: 0") {
			t.Errorf("got exit code %d, %q, %q", code, out, errOut)
		}
		if code := p.exitCode(patience, "status --drain"); code != 0 {
			t.Errorf("exit code: got %d, want 0", code)
		}
	}
}

// TestStatusUndrain: after --undrain the service serves new clients, does not end with the
// last of them, and can be drained again.
func TestStatusUndrain(t *testing.T) {
	w, p, conn := startServing(t)
	undrain := func(want string) {
		t.Helper()
		if code, out, errOut := w.status("--undrain"); code != 0 || out != want {
			t.Errorf("--undrain: got exit code %d, %q, %q, want %q", code, out, errOut, want)
		}
	}
	undrain("The service was not draining.\n")
	for range 2 {
		if code, _, errOut := w.status("--drain"); code != 0 {
			t.Fatalf("--drain: exit code %d, %s", code, errOut)
		}
		if _, err := w.dial(p, false); err == nil {
			t.Error("a new client is served while the service drains")
		}
		undrain("New clients are served again.\n")
		if r := w.report(); r.State != control.StateServing {
			t.Errorf("state after --undrain: got %q", r.State)
		}
	}
	undrain("The service was not draining.\n")
	p.waitLine("not draining any more: new clients are served")
	w.readsAsNewClient(p, served(t, w.report()).VDI)
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	w.waitClean(p)
	if code, out, errOut := w.status("--drain"); code != 0 || !strings.Contains(out, "may finish: 0") {
		t.Errorf("--drain once more: got exit code %d, %q, %q", code, out, errOut)
	}
	if code := p.exitCode(patience, "status --drain"); code != 0 {
		t.Errorf("exit code: got %d, want 0", code)
	}
}

// readsAsNewClient has a new client read a sector and disconnect.
func (w *world) readsAsNewClient(p *process, vdi string) {
	w.t.Helper()
	conn, err := w.open(p, w.export(vdi), false)
	if err != nil {
		w.t.Fatalf("a new client after --undrain: %v", err)
	}
	if _, err := conn.ReadAt(make([]byte, 512), 0); err != nil {
		w.t.Errorf("a new client after --undrain: %v", err)
	}
	if err := conn.Close(); err != nil {
		w.t.Error(err)
	}
}

// TestUndrainAfterSignal: a signal ends a draining service that still has connections, and
// --undrain fails then.
func TestUndrainAfterSignal(t *testing.T) {
	w, p, conn := startServing(t)
	if code, _, errOut := w.status("--drain"); code != 0 {
		t.Fatalf("--drain: exit code %d, %s", code, errOut)
	}
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	p.waitLine("msg=stopping")
	if code, out, _ := w.status("--undrain"); code != 1 || out != "" {
		t.Errorf("--undrain after SIGTERM: got exit code %d, %q", code, out)
	}
	if code := p.stop(patience); code != 0 { // the second signal: does not wait for the client
		t.Errorf("exit code: got %d, want 0", code)
	}
	if _, err := conn.ReadAt(make([]byte, 512), 0); err == nil {
		t.Error("the connection is still served")
	}
}
