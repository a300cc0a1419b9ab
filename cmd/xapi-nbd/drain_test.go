package main

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/cmd/xapi-nbd/internal/control"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
	"xapi-nbd/xapi/xapitest"
)

// A service that drains refuses who comes, serves who is there, and then ends.
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
	if r := w.report(); r.State != control.StateDraining || r.Refused[reasonDraining] != 3 {
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

// Without anybody to wait for, it ends at once, and says so first.
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

// A drain that was taken back leaves a service as it was before: it serves new
// clients, does not end with the last of them, and can be drained again.
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

// readsAsNewClient has a new client read a sector and leave.
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

// What was decided is not taken back: neither the end of a service that has drained,
// nor that by a signal.
func TestUndrainTooLate(t *testing.T) {
	empty := func() bool { return true }
	d := newDrainState()
	if d.decide(empty) {
		t.Error("a service that does not drain has decided to end")
	}
	if !d.start() || d.start() || !d.isOn() {
		t.Error("draining does not begin once")
	}
	if d.decide(func() bool { return false }) {
		t.Error("a service that serves somebody has decided to end")
	}
	if changed, err := d.takeBack(); !changed || err != nil || d.isOn() {
		t.Errorf("taken back in time: got %v, %v", changed, err)
	}
	d.start()
	if !d.decide(empty) {
		t.Error("a drained service has not decided to end")
	}
	if changed, err := d.takeBack(); changed || !errors.Is(err, errEnding) || !d.isOn() {
		t.Errorf("taken back after the decision: got %v, %v", changed, err)
	}
	for _, drains := range []bool{false, true} {
		d := newDrainState()
		if drains {
			d.start()
		}
		d.ending()
		if changed, err := d.takeBack(); changed || !errors.Is(err, errEnding) || d.isOn() != drains {
			t.Errorf("taken back after a signal, draining %v: got %v, %v", drains, changed, err)
		}
	}
}

// The wait for the end of a drain survives that the drain is taken back.
func TestDrainAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, empty := newDrainState(), atomic.Bool{}
		ended := make(chan bool, 1)
		go func() { ended <- d.wait(t.Context(), empty.Load) }()
		for range 3 {
			d.start()
			time.Sleep(2 * drainPoll)
			if _, err := d.takeBack(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(2 * drainPoll)
		}
		empty.Store(true)
		time.Sleep(2 * drainPoll)
		select {
		case <-ended:
			t.Fatal("the service ends although it does not drain")
		default:
		}
		d.start()
		if !<-ended {
			t.Error("a drained service does not end")
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if newDrainState().wait(ctx, empty.Load) {
			t.Error("a service that was stopped counts as drained")
		}
	})
}

// A signal ends a service that drains although somebody is served, and nothing stops
// that.
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
