package main

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"xapi-nbd/cmd/xapi-nbd/internal/control"
	"xapi-nbd/test/requires"
)

// TestUpgradeKilled kills the old or the new process right behind each operation of either
// on the files by which they hand over. Whatever the point, the transfers of the survivor go
// on, nothing that it has is removed, and in the end nothing is left.
func TestUpgradeKilled(t *testing.T) {
	setServiceEnv(t)
	requires.Tool(t, "strace")
	points := recordUpgrade(t)
	var tests []func()
	var reached atomic.Int32
	for _, at := range points {
		for _, victim := range []string{"old", "new"} {
			tests = append(tests, func() {
				t.Run(victim+" process killed after "+strings.TrimPrefix(at.String(), "before "), func(t *testing.T) {
					if killDuringUpgrade(t, at, victim == "old") {
						reached.Add(1)
					}
				})
			})
		}
	}
	runAbreast(tests)
	t.Logf("%d points, twice each; %d were reached", len(points), reached.Load())
	if int(reached.Load()) < len(points) {
		t.Error("too few points were reached")
	}
}

// runAbreast calls the tests, abreast of them at a time.
func runAbreast(tests []func()) {
	next := make(chan func())
	var workers sync.WaitGroup
	for range abreast {
		workers.Go(func() {
			for test := range next {
				test()
			}
		})
	}
	for _, test := range tests {
		next <- test
	}
	close(next)
	workers.Wait()
}

// handoverFiles are the files by which two processes hand over.
var handoverFiles = []string{
	"state", "state/gen.new", "state/journal.lock", "state/control", "state/control.1", "state/control.2",
}

// upgradeTracer makes strace watch the service and the process that it starts.
func (w *upgradeWorld) upgradeTracer(inject string, files ...string) (*crashWorld, *tracer) {
	w.t.Helper()
	c := &crashWorld{world: w.world, vdi: w.vdi, strace: requires.Tool(w.t, "strace")}
	tr, err := c.attach(w.p, inject, files...)
	if err != nil && os.Getenv("STRICT") != "1" {
		w.t.Skip(err)
	}
	if err != nil {
		w.t.Fatal(err)
	}
	return c, tr
}

// recordUpgrade returns what two processes do during an upgrade.
func recordUpgrade(t *testing.T) (points []point) {
	t.Helper()
	w := newUpgradeWorld(t, 64<<10)
	c, tr := w.upgradeTracer("", handoverFiles...)
	last := w.upgrade()
	w.waitProcesses(last.PID)
	// strace ends with the last process; what the stop does is no part of the upgrade.
	upgrade := &tracer{lines: make(chan string, lifetimeLines)}
	for range len(tr.lines) {
		upgrade.lines <- <-tr.lines
	}
	close(upgrade.lines)
	points = upgrade.ops(c)
	w.stopAll(last.PID)
	tr.drain()
	for _, want := range []point{
		{what: "linkat", file: "state/control", n: 1},
		{what: "renameat", file: "state/control.2", n: 1},
		{what: "renameat", file: "state/gen.new", n: 1},
	} {
		if !slices.Contains(points, want) {
			t.Errorf("the record lacks %v: %v", want, points)
		}
	}
	if t.Failed() {
		t.FailNow()
	}
	return points
}

// killDuringUpgrade kills one of the processes at a point of an upgrade. It returns false if
// this upgrade took fewer operations.
func killDuringUpgrade(t *testing.T, at point, old bool) bool {
	w := newUpgradeWorld(t, 64<<10)
	foreign := w.addForeignVBD()
	conn := w.mustOpen(w.p, w.vdi)
	if _, err := conn.ReadAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	first := w.p.cmd.Process.Pid
	reached := w.duringUpgrade(at, func() { w.killOne(first, old) })
	report, err := w.tryUpgrade()
	upgraded := err == nil && report.Error == ""
	w.settle(first, upgraded)
	switch pids := w.processes(); {
	case slices.Contains(pids, first):
		// It serves what it had, and new clients, too, unless it was replaced.
		if _, err := conn.ReadAt(make([]byte, 512), 0); err != nil {
			t.Errorf("a transfer of the old process: %v", err)
		}
		if !upgraded {
			w.readsAsNewClient(w.p, w.vdi)
		}
	case len(pids) == 1:
		w.readsAsNewClient(w.p, w.vdi)
	}
	conn.Close()
	w.recoverAll(foreign)
	return reached.Load()
}

// duringUpgrade calls act at a point of the next upgrade, while the process that has got
// there is stopped. reached is true from then on.
func (w *upgradeWorld) duringUpgrade(at point, act func()) (reached *atomic.Bool) {
	first := w.p.cmd.Process.Pid
	c, tr := w.upgradeTracer(at.what+":signal=STOP", at.file)
	reached = new(atomic.Bool)
	c.inBackground(tr, func() {
		for n := 1; ; n++ {
			thread, ok := tr.waitStop()
			if !ok {
				return
			}
			if n == at.n {
				reached.Store(true)
				// Not detach: strace may wait for ever for the end of a process that its
				// parent has not waited for.
				_ = tr.cmd.Process.Kill()
				tr.drain()
				act()
			}
			_ = syscall.Kill(cmp.Or(thread, first), syscall.SIGCONT)
		}
	})
	return reached
}

// killOne kills the old process, or the new one if there is one yet.
func (w *upgradeWorld) killOne(first int, old bool) {
	for _, pid := range w.processes() {
		if (pid == first) == old {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

// settle waits until the survivor has noticed the end of the other one.
func (w *upgradeWorld) settle(first int, upgraded bool) {
	w.t.Helper()
	eventually(w.t, func() string {
		pids := w.processes()
		var r control.StatusReport
		err := control.Ask(w.t.Context(), filepath.Join(w.dir, "state", control.SocketName), "GET", "/status", &r)
		switch {
		case len(pids) == 0:
			return ""
		case slices.Contains(pids, first) && len(pids) == 1 && (upgraded || err == nil && r.PID == first):
			return ""
		case slices.Contains(pids, first) && len(pids) == 2 && err == nil && r.PID != first && len(r.Replaced) == 1:
			return "" // nothing was killed
		case !slices.Contains(pids, first) && len(pids) == 1 && err == nil && r.PID == pids[0] && r.State == control.StateServing:
			return ""
		}
		return fmt.Sprintf("processes %v, status of %d: %v\n%s", pids, r.PID, err, w.p.output())
	})
}

// addForeignVBD adds the VBD of another tool.
func (w *upgradeWorld) addForeignVBD() string {
	w.t.Helper()
	uuid, err := w.host.AddForeignVBD(w.vdi, nil)
	if err == nil {
		err = w.host.PlugForeign(uuid)
	}
	if err != nil {
		w.t.Fatal(err)
	}
	return uuid
}

// recoverAll ends all processes and has a fresh one recover, after which only the VBD of
// another tool may be there.
func (w *upgradeWorld) recoverAll(foreign string) {
	w.t.Helper()
	for _, pid := range w.processes() {
		_ = syscall.Kill(pid, syscall.SIGTERM)
	}
	w.waitProcesses()
	p := w.start()
	eventually(w.t, func() string {
		vbds := w.host.VBDs()
		if len(vbds) == 1 && vbds[0].UUID == foreign && w.journal() == "" {
			return ""
		}
		return fmt.Sprintf("VBDs: %+v, journal %q\n%s%s", vbds, w.journal(), w.p.output(), p.output())
	})
	for _, e := range w.host.Events() {
		if e.VBD == foreign && e.Change != "created" && e.Change != "plugged" {
			w.t.Errorf("the VBD of another tool was %s", e.Change)
		}
	}
	if code := p.stop(patience); code != 0 {
		w.t.Errorf("exit code: got %d, want 0", code)
	}
	w.wantNoTraces()
}
