package vdi_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"syscall"
	"testing"

	"xapi-nbd/vdi"
)

// scenario is what something happens in. It is the same every time, operation by
// operation.
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
	recovery = scenario{"recovery", (*scene).leaveBehind, func(s *scene) {
		s.start()
		s.stop()
	}}
)

// Wherever the power is cut, the VBDs that may be plugged are in the journal by
// then, whatever the disk has kept of what was not synced, and the next start
// leaves nothing of ours.
func TestPowerLoss(t *testing.T) {
	if testing.Short() {
		t.Skip("cuts the power at every file operation, which takes 10 s")
	}
	for _, sc := range []scenario{attachTwo, recovery} {
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
	for _, sc := range []scenario{attachOne, recovery} {
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

// moment is where in an operation or a call something happens.
type moment int

const (
	before moment = iota // it is never executed
	late                 // a call: executed when the next process has done its recovery
	after                // executed, but the answer is not heard
)

func (m moment) String() string { return [...]string{"before", "late in", "after"}[m] }

// step is a file operation or a call that was recorded: the n-th of its kind, as
// what is done side by side comes in any order.
type step struct {
	call bool
	n    int
	what string
}

// numbered makes the step of an operation or a call that is the raw-th of all. It
// is called for each step before it and again after it.
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

// lasting are the calls of which something stays when nobody hears their answer.
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

// cutAt cuts the power at a point, once for each state that the disk may then be
// in, and returns how many there were.
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
		if cuts >= len(survivors) { // what is done side by side came in another order
			return cuts
		}
		s.mu.Lock() // a call of the dead process may still be on its way
		s.files = survivors[cuts]
		s.mu.Unlock()
		s.recover()
		s.end()
		if cuts++; cuts == len(survivors) || t.Failed() {
			return cuts
		}
	}
}

// survivors returns the different states that the disk may be in after the cut.
func (s *scene) survivors() []*vdi.MemFS {
	var all []*vdi.MemFS
	for _, survival := range vdi.Survivals {
		files := s.files.AfterPowerCut(survival)
		same := func(other *vdi.MemFS) bool { return other.String() == files.String() }
		if !slices.ContainsFunc(all, same) {
			all = append(all, files)
		}
	}
	return all
}

// recover does what the next process does, and requires that nothing is left.
func (s *scene) recover() {
	s.t.Helper()
	s.host.OnCall(nil)
	s.boot()
	do(s.t, s.process.open())
	got, err := s.process.manager.Recover(s.t.Context())
	unanswered := len(s.files.Creates(memStateDir)) > 0
	if (err != nil) != unanswered || len(got.Left) > 0 != unanswered {
		s.t.Errorf("recovery: %+v, %v; the disk:\n%v", got, err, s.files)
	}
	if s.at.when == late {
		if s.at.what == "VBD.create" && !unanswered {
			s.t.Error("nobody knows of the VBD.create that is still to be executed")
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

// forgetCreates lets so much time pass that what was asked of xapi and not
// answered is not expected any more.
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
	s.files = s.files.AfterPowerCut(vdi.NothingSurvives)
	s.recover()
	s.end()
}
