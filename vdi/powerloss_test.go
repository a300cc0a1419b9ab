package vdi_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"xapi-nbd/internal/fsys/memfs"
	"xapi-nbd/vdi"
)

// scenario is a run of processes in which the power is cut or an operation fails. It makes the
// same operations each time.
type scenario struct {
	name    string
	prepare func(s *scene)
	run     func(s *scene)
}

var (
	attachTwo = scenario{"attach and detach", func(*scene) {}, func(s *scene) {
		s.start()
		first := s.attach(0)
		second := s.attach(1)
		s.detach(first)
		first = s.attach(0)
		s.detach(first)
		s.detach(second)
		s.stop()
	}}
	attachOne = scenario{"attach and detach", func(*scene) {}, func(s *scene) {
		s.start()
		s.detach(s.attach(0))
		s.stop()
	}}
	write = scenario{"write", func(*scene) {}, func(s *scene) {
		s.start()
		s.detach(s.write(0))
		s.stop()
	}}
	recovery = scenario{"recovery", (*scene).leaveBehind, func(s *scene) {
		s.start()
		s.stop()
	}}
)

// TestPowerLoss cuts the power at every point. The VBDs that may be plugged are then in the
// journal, no matter which unsynced changes survive, and the next start removes everything.
func TestPowerLoss(t *testing.T) {
	if testing.Short() {
		t.Skip("cuts the power at every file operation, which takes 10 s")
	}
	vdi.SetGuardEvery(t, time.Hour) // nothing that happens by time
	for _, sc := range []scenario{attachTwo, write, recovery} {
		t.Run(sc.name, func(t *testing.T) {
			files, calls := sc.record(t)
			points, cuts := append(pointsOf(files, before, after), pointsOf(calls, before, after, late)...), 0
			for _, at := range points {
				t.Run(at.String(), func(t *testing.T) { cuts += sc.cutAt(t, at) })
			}
			t.Logf("%d file operations and %d calls: %d points, %d power cuts", len(files), len(calls), len(points), cuts)
		})
	}
}

// A file operation fails once: attaching may fail, but nothing is left.
func TestFileErrors(t *testing.T) {
	vdi.SetGuardEvery(t, time.Hour) // nothing that happens by time
	for _, sc := range []scenario{attachOne, write, recovery} {
		t.Run(sc.name, func(t *testing.T) {
			files, _ := sc.record(t)
			points := pointsOf(files, before, after)
			for _, at := range points {
				t.Run(at.String(), func(t *testing.T) { sc.failAt(t, at) })
			}
			t.Logf("%d file operations: %d points", len(files), len(points))
		})
	}
}

// moment is the moment in an operation or a call at which the power is cut.
type moment int

const (
	before moment = iota // it is never executed
	late                 // a call: executed when the next process has done its recovery
	after                // executed, but there is no response
)

func (m moment) String() string { return [...]string{"before", "late in", "after"}[m] }

// step is a recorded file operation or call: the nth of its kind, because concurrent steps
// come in any order.
type step struct {
	call bool
	n    int
	what string
}

// numbered returns the step of the operation or call with the number raw. It is called before
// and after each step.
func (s *scene) numbered(call bool, raw int, what string) step {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := step{call: call, n: raw}
	if _, ok := s.numbers[all]; !ok {
		kind := step{call: call, what: what}
		s.kinds[kind]++
		s.numbers[all] = s.kinds[kind]
	}
	return step{call: call, n: s.numbers[all], what: what}
}

// point is a moment in a step.
type point struct {
	step
	when moment
}

func (p point) String() string {
	kind := "file operation"
	if p.call {
		kind = "call"
	}
	return fmt.Sprintf("%v %s %d, %s", p.when, kind, p.n, p.what)
}

func pointsOf(steps []step, moments ...moment) []point {
	var points []point
	for _, s := range steps {
		for _, when := range moments {
			if when != late || slices.Contains(lasting, s.what) {
				points = append(points, point{s, when})
			}
		}
	}
	return points
}

// lasting are the calls that have an effect even if their response is lost.
var lasting = []string{"VBD.create", "VBD.plug", "VBD.unplug", "VBD.destroy"}

// record runs a scenario undisturbed and returns its steps.
func (sc scenario) record(t *testing.T) (files, calls []step) {
	t.Helper()
	s := newScene(t)
	sc.prepare(s)
	s.watch()
	sc.run(s)
	s.wantClean()
	if len(s.steps[false]) == 0 || len(s.steps[true]) == 0 {
		t.Fatal("nothing was recorded")
	}
	return s.steps[false], s.steps[true]
}

// cutAt cuts the power at a point, once for each possible state of the disk, and returns the
// number of these.
func (sc scenario) cutAt(t *testing.T, at point) int {
	t.Helper()
	for cuts := 0; ; {
		s := newScene(t)
		sc.prepare(s)
		s.at = at
		s.watch()
		sc.run(s)
		if !s.disturbed() {
			t.Fatal("the point was not reached")
		}
		s.process.bury()
		survivors := s.survivors()
		if cuts >= len(survivors) { // concurrent steps came in another order
			return cuts
		}
		s.mu.Lock() // a call of the killed process may still arrive
		s.files = survivors[cuts]
		s.mu.Unlock()
		s.recover()
		s.end()
		if cuts++; cuts == len(survivors) || t.Failed() {
			return cuts
		}
	}
}

// survivors returns the different possible states of the disk after the cut.
func (s *scene) survivors() []*vdi.MemFS {
	var all []*vdi.MemFS
	for _, survival := range memfs.Survivals {
		files := s.files.AfterPowerCut(survival)
		same := func(other *vdi.MemFS) bool { return other.String() == files.String() }
		if !slices.ContainsFunc(all, same) {
			all = append(all, files)
		}
	}
	return all
}

// recover runs the next process, and requires that nothing is left.
func (s *scene) recover() {
	s.t.Helper()
	s.host.OnCall(nil)
	s.boot()
	do(s.t, s.process.open())
	got, err := s.process.manager.Recover(s.t.Context())
	// xapi may still be executing a call of the killed process, of which it tells.
	for s.at.when != late && err != nil && strings.Contains(err.Error(), "xapi is still working on the VBD") {
		got, err = s.process.manager.Recover(s.t.Context())
	}
	unanswered := len(s.files.Creates(memStateDir)) > 0
	if (err != nil) != unanswered || len(got.Left) > 0 != unanswered {
		s.t.Errorf("recovery: %+v, %v; the disk:\n%v", got, err, s.files)
	}
	if s.at.when == late {
		if s.at.what == "VBD.create" && !unanswered {
			s.t.Error("no list has the VBD.create that is still to be executed")
		}
		s.release()
		<-s.executed
		_, err := s.process.manager.Recover(s.t.Context())
		do(s.t, err)
	}
	if unanswered && s.at.when != late {
		s.forgetCreates()
		return
	}
	do(s.t, s.process.manager.Close(s.t.Context()))
	s.wantClean()
}

// forgetCreates makes the pending calls of VBD.create so old that their VBDs are not expected
// any more.
func (s *scene) forgetCreates() {
	s.t.Helper()
	ctx, cancel := context.WithCancel(s.t.Context())
	cancel()
	if err := s.process.manager.Close(ctx); !errors.Is(err, vdi.ErrLeft) {
		s.t.Errorf("closing with a VBD.create that was not answered: got %v, want ErrLeft", err)
	}
	s.files.AgeCreates(memStateDir)
	s.boot()
	do(s.t, s.process.open())
	_, err := s.process.manager.Recover(s.t.Context())
	do(s.t, err)
	do(s.t, s.process.manager.Close(s.t.Context()))
	s.wantClean()
}

// failAt makes a file operation fail, with or without having been executed.
func (sc scenario) failAt(t *testing.T, at point) {
	t.Helper()
	s := newScene(t)
	sc.prepare(s)
	s.at, s.failure = at, syscall.EIO
	s.watch()
	sc.run(s)
	if !s.disturbed() {
		t.Fatal("the point was not reached")
	}
	s.wantClean()
	// The entry of a VBD that is gone may come back. No harm may come of it.
	s.files = s.files.AfterPowerCut(memfs.NothingSurvives)
	s.recover()
	s.end()
}
