package main

import (
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"xapi-nbd/xapi/xapitest"
)

// TestCrash runs the real service with a simulated host, from its start to its stop, with one
// client in between, which reads or writes. It repeats that with an interruption at each point: each call to xapi,
// and each operation on the files of the service and of its attachment. After each run no VBD
// of the service may be left, and no other VBD may have been changed.
func TestCrash(t *testing.T) {
	setServiceEnv(t)
	for _, life := range []life{reading, writing, recovering} {
		calls, ops := settledRecord(t, life)
		for _, tt := range interruptions {
			if life == recovering && !tt.kills {
				continue
			}
			points := calls
			if tt.ofOps {
				points = ops
			}
			name, onlyAfter := tt.name, tt.onlyAfter
			if life != reading {
				// The point before an operation is the point after the previous one. Both
				// are tried once, above.
				name, onlyAfter = name+" while "+life.String(), tt.ofOps
			}
			if !t.Run(name, func(t *testing.T) { interruptAll(t, life, tt, around(points, onlyAfter)) }) {
				return // the next would fail for the same reason, and failing takes time
			}
		}
	}
}

// life is the kind of client that a service has in a run.
type life int

const (
	reading    life = iota
	writing         // the service also asks xapi whether the client still may
	recovering      // none: an earlier service was killed
)

func (l life) String() string { return [...]string{"reading", "writing", "recovering"}[l] }

// setServiceEnv makes many short runs of the service cheap.
func setServiceEnv(t *testing.T) {
	t.Helper()
	// The race detector would sleep for a second at the end of each.
	t.Setenv("GORACE", os.Getenv("GORACE")+" atexit_sleep_ms=0")
	// The cost of tracing grows with the number of threads.
	t.Setenv("GOMAXPROCS", "1")
}

// interruption is a way to disturb a service at a point.
type interruption struct {
	name      string
	ofOps     bool // at operations instead of calls
	kills     bool // the service is killed
	onlyAfter bool
	prepare   func(w *crashWorld, p *process, at point)
}

var interruptions = []interruption{
	{name: "killed at calls", kills: true, prepare: (*crashWorld).killAtCall},
	{name: "killed at operations", kills: true, ofOps: true, prepare: func(w *crashWorld, p *process, op point) {
		if op.after {
			w.atOp(p, op, func() { _ = p.cmd.Process.Kill() })
		} else {
			w.killBeforeOp(p, op)
		}
	}},
	{name: "answer lost", prepare: func(w *crashWorld, p *process, call point) {
		w.atCall(p, call, func() xapitest.Verdict {
			w.disturb(func() {})
			return xapitest.Drop
		})
	}},
	{name: "xapi killed at calls", prepare: func(w *crashWorld, p *process, call point) {
		w.atCall(p, call, func() xapitest.Verdict {
			w.disturb(w.host.Restart)
			return xapitest.Proceed
		})
	}},
	{name: "xapi gone for a moment at calls", prepare: func(w *crashWorld, p *process, call point) {
		w.atCall(p, call, func() xapitest.Verdict {
			w.stopXapi()
			return xapitest.Proceed
		})
	}},
	// After each operation, which is before the next one.
	{name: "xapi killed at operations", ofOps: true, onlyAfter: true, prepare: func(w *crashWorld, p *process, op point) {
		w.atOp(p, op, func() { w.disturb(w.host.Restart) })
	}},
}

// disturb calls act, which interrupts the service or its host.
func (w *crashWorld) disturb(act func()) {
	close(w.disturbed)
	act()
	close(w.over)
}

// stopXapi is disturb with xapi stopped for a moment, so that the service's calls may fail.
// The result must not depend on the length of that moment.
func (w *crashWorld) stopXapi() {
	close(w.disturbed)
	w.host.Stop()
	timer := time.AfterFunc(50*time.Millisecond, func() {
		defer close(w.over)
		if err := w.host.Resume(); err != nil {
			w.t.Error(err)
		}
	})
	w.t.Cleanup(func() {
		if !timer.Stop() {
			<-w.over
		}
	})
}

// settledRecord repeats record until two results are equal: on a slow machine the service
// also makes periodic calls.
func settledRecord(t *testing.T, life life) (calls, ops []point) {
	t.Helper()
	text := func(points []point) string {
		var lines []string
		for _, p := range points {
			lines = append(lines, p.String())
		}
		slices.Sort(lines)
		return strings.Join(lines, "\n")
	}
	last := ""
	for range 10 {
		calls, ops = record(t, life)
		now := text(calls) + text(ops)
		if now == last {
			return calls, ops
		}
		last = now
	}
	t.Fatal("the service does something else every time")
	return nil, nil
}

// record returns the calls and operations of a service that is not interrupted.
func record(t *testing.T, life life) (calls, ops []point) {
	t.Helper()
	w := newCrashWorld(t, life)
	p := w.launchHeld()
	tr, err := w.attach(p, "", files...)
	if err != nil && os.Getenv("STRICT") != "1" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	w.watch(p, func(at point) xapitest.Verdict {
		mu.Lock()
		defer mu.Unlock()
		if !at.after {
			calls = append(calls, at)
		}
		return xapitest.Proceed
	})
	if !w.cycle(p) {
		t.Error("the service was killed")
	}
	ops = tr.ops(w)
	for _, want := range indispensable(life) {
		if !slices.Contains(calls, want) && !slices.Contains(ops, want) {
			t.Errorf("the record lacks %v", want)
		}
	}
	if t.Failed() {
		t.FailNow()
	}
	return calls, ops
}

// files are the files of the state folder and of the attachment.
var files = []string{
	".", "state", "state/lock", "state/control", "state/VBDs_to_clean_up", "state/VBDs_to_clean_up.new",
	"state/VBD_creates_pending", "state/VBD_creates_pending.new", "state/journal.lock", "state/gen.new",
	"xensource-inventory", ourDevice, imageFile,
}

// indispensable returns the points that every record must contain, so that the test covers
// them.
func indispensable(life life) []point {
	points := []point{
		{what: "VBD.unplug", n: 1},
		{what: "VBD.destroy", n: 1},
		{what: "flock", file: "state/lock", n: 1},
		{what: "write", file: "state/VBDs_to_clean_up.new", n: 1},
		{what: "fsync", file: "state/VBDs_to_clean_up.new", n: 1},
		{what: "renameat", file: "state/VBDs_to_clean_up.new", n: 1},
		{what: "fsync", file: "state", n: 1},
	}
	if life == recovering {
		return append(points, point{what: "VBD.destroy", n: 2})
	}
	if life == writing { // the checks before and after the plug
		points = append(points, point{what: "VBD.get_all_records_where", n: 3})
	}
	if life == reading {
		points = append(points, point{what: "preadv2", file: imageFile, n: 1})
	}
	return append(points, []point{
		{what: "VBD.create", n: 1},
		{what: "VBD.plug", n: 1},
		{what: "mkdirat", file: "state", n: 1},
		{what: "fsync", file: "state", n: 2},
		{what: "openat", file: ourDevice, n: 1},
		{what: "close", file: imageFile, n: 1},
	}...)
}

// around makes the points before and after, or only those after.
func around(points []point, onlyAfter bool) (all []point) {
	for _, p := range points {
		if !onlyAfter {
			all = append(all, p)
		}
		p.after = true
		all = append(all, p)
	}
	return all
}

// abreast is how many points are interrupted at a time. A service mostly waits.
const abreast = 4

// interruptAll runs a test for each point and says how it went.
func interruptAll(t *testing.T, life life, how interruption, points []point) {
	var begun, interrupted, leaving, failed atomic.Int32
	next := make(chan point)
	var workers sync.WaitGroup
	for range abreast {
		workers.Go(func() {
			for at := range next {
				ok := t.Run(at.String(), func(t *testing.T) {
					begun.Add(1)
					reached, left := interrupt(t, life, how, at)
					if !reached { // how often files are read varies a little
						reached, left = interrupt(t, life, how, at)
					}
					if !reached {
						t.Fatal("the service did not come to this point, twice")
					}
					interrupted.Add(1)
					if left {
						leaving.Add(1)
					}
				})
				if !ok {
					failed.Add(1)
				}
			}
		})
	}
	for _, at := range points {
		if failed.Load() >= abreast {
			t.Error("giving up")
			break
		}
		next <- at
	}
	close(next)
	workers.Wait()
	if interrupted.Load() < begun.Load() {
		t.Errorf("only %d of %d points were interrupted", interrupted.Load(), len(points))
	}
	t.Logf("%d of %d points, of which %d left something to the next service", interrupted.Load(), len(points), leaving.Load())
}

// interrupt lets a service live with one interruption. It reports whether the service came to
// that point, and whether something was left to the next one.
func interrupt(t *testing.T, life life, how interruption, at point) (reached, left bool) {
	t.Helper()
	w := newCrashWorld(t, life)
	p := w.launchHeld()
	w.killed = how.kills
	how.prepare(w, p, at)
	alive := w.cycle(p)
	if !how.kills {
		if !alive {
			t.Error("the service was killed")
		}
		return isClosed(w.disturbed), false
	}
	if alive {
		return false, false
	}
	if status := p.cmd.ProcessState.Sys().(syscall.WaitStatus); status.Signal() != syscall.SIGKILL {
		t.Fatalf("the service was not killed: %v", p.cmd.ProcessState)
	}
	w.host.OnCall(nil)
	return true, w.restart()
}
