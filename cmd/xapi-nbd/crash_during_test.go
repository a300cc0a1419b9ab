package main

import (
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"xapi-nbd/cmd/xapi-nbd/internal/control"
)

// TestCrashDuringStorageWork interrupts the service while xapi plugs or unplugs. The operation
// goes on in xapi, and the service must not change the VBD until it has ended.
func TestCrashDuringStorageWork(t *testing.T) {
	setServiceEnv(t)
	for _, operation := range []string{"plug", "unplug"} {
		t.Run("service killed during "+operation, func(t *testing.T) {
			w := newCrashWorld(t, reading)
			w.killed = true
			p := w.launchHeld()
			reached, release := w.host.BlockWork(operation)
			p.once(reached, p.kill)
			if w.cycle(p) {
				t.Fatal("the service was not killed")
			}
			w.recoverFromWork(release)
		})
		t.Run("xapi killed during "+operation, func(t *testing.T) {
			w := newCrashWorld(t, reading)
			w.outlives(operation, w.host.Restart)
		})
		t.Run("connection lost during "+operation, func(t *testing.T) {
			w := newCrashWorld(t, reading)
			w.outlives(operation, w.host.DropConnections)
		})
	}
}

// once calls act when the channel is closed, unless the process has ended before.
func (p *process) once(closed <-chan struct{}, act func()) {
	go func() {
		select {
		case <-closed:
			act()
		case <-p.ended:
		}
	}()
}

// recoverFromWork has a new service recover while an operation that the previous one started
// goes on.
func (w *crashWorld) recoverFromWork(release func()) {
	w.t.Helper()
	p := w.start()
	w.untilStillWorking(p)
	if w.isClean() {
		w.t.Error("the VBD has gone from under the work")
	}
	release()
	// It tries again by itself, but not at once.
	socket := filepath.Join(w.dir, "state", control.SocketName)
	w.until(p, "recovery", func() bool {
		var report control.RecoverReport
		if err := control.Ask(w.t.Context(), socket, http.MethodPost, "/recover", &report); err != nil {
			w.t.Error(err)
		}
		return w.isClean()
	})
	w.checkOthers(p)
	w.mustServe(p)
	w.stopped(p)
}

// untilStillWorking waits until the service has found that it must not change the VBD yet.
func (w *crashWorld) untilStillWorking(p *process) {
	w.t.Helper()
	w.until(p, "a look at the VBD", func() bool {
		return strings.Contains(p.output(), "xapi is still working on the VBD")
	})
}

// outlives calls act during an operation of xapi, and requires that the service recovers
// from it without a restart.
func (w *crashWorld) outlives(operation string, act func()) {
	w.t.Helper()
	p := w.launchHeld()
	reached, release := w.host.BlockWork(operation)
	p.once(reached, func() {
		w.disturb(func() {
			act()
			w.untilStillWorking(p)
			release()
		})
	})
	if !w.cycle(p) {
		w.t.Error("the service was killed")
	}
	if !isClosed(w.disturbed) {
		w.t.Error("the service did not come to this point")
	}
}
