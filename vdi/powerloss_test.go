package vdi_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"

	"xapi-nbd/vdi"
	"xapi-nbd/xapi"
	"xapi-nbd/xapi/xapitest"
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

// scene is a host on which one process after the other plays.
type scene struct {
	t       *testing.T
	host    *xapitest.Host
	content []byte
	vdis    []string // uuids
	foreign string   // uuid of a VBD of somebody else
	files   *vdi.MemFS
	process *process
	ctx     context.Context // of the first process; ends when the power is cut
	die     func()

	at       point         // where something happens; its zero value means nowhere
	failure  error         // with which a file operation fails there; nil means the power is cut
	struck   chan struct{} // closed when it has happened
	held     chan struct{} // closed when a late call may go on
	release  func()        // closes held
	executed chan struct{} // closed when the late call was

	mu    sync.Mutex      // guards the rest
	begun map[string]bool // VBDs whose plug was begun
	steps map[bool][]step // calls and file operations, by step.call
	// numbers are those of steps among their kind, by their number among all.
	numbers, kinds map[step]int
}

func newScene(t *testing.T) *scene {
	t.Helper()
	dir := shortDir(t)
	host, err := xapitest.Start(xapitest.Config{Dir: dir, Style: xapitest.StyleSM})
	do(t, err)
	s := &scene{
		t: t, host: host, content: pattern(64 << 10), files: vdi.NewMemFS(),
		struck: make(chan struct{}), held: make(chan struct{}), executed: make(chan struct{}),
		begun: make(map[string]bool), steps: make(map[bool][]step),
		numbers: make(map[step]int), kinds: make(map[step]int),
	}
	s.ctx, s.die = context.WithCancel(t.Context())
	s.release = sync.OnceFunc(func() { close(s.held) })
	t.Cleanup(s.end)
	image := filepath.Join(dir, "image")
	do(t, os.WriteFile(image, s.content, 0o600))
	for range 3 {
		uuid, err := host.AddVDI(xapitest.VDISpec{Image: image})
		do(t, err)
		s.vdis = append(s.vdis, uuid)
	}
	s.foreign, err = host.AddForeignVBD(s.vdis[2], map[string]string{"owner": "somebody"})
	do(t, err)
	do(t, host.PlugForeign(s.foreign))
	s.files.WriteDurably("/var/log", "")
	s.boot()
	return s
}

// end takes the host away. A second time does nothing.
func (s *scene) end() {
	s.release() // else Close would wait for the call
	s.die()
	s.process.cut()
	s.process.bury()
	if err := s.host.Close(); err != nil {
		s.t.Error(err)
	}
}

// leaveBehind leaves what earlier processes may have left: VBDs of the journal,
// plugged, not plugged and gone, and one that is only tagged.
func (s *scene) leaveBehind() {
	tag := map[string]string{"xapi-nbd": s.host.InstallationUUID() + " somenonce"}
	journal := ""
	for _, plug := range []bool{true, false} {
		uuid, err := s.host.AddForeignVBD(s.vdis[0], tag)
		do(s.t, err)
		if plug {
			do(s.t, s.host.PlugForeign(uuid))
		}
		s.begun[uuid] = true
		journal += uuid + "\n"
	}
	_, err := s.host.AddForeignVBD(s.vdis[1], tag)
	do(s.t, err)
	s.files.WriteDurably(memStateDir+"/VBDs_to_clean_up", journal+"11111111-2222-3333-4444-555555555555\n")
}

// boot makes the next process, without opening its manager.
func (s *scene) boot() {
	s.t.Helper()
	p, err := newProcess(s.host, s.files)
	do(s.t, err)
	s.process = p
}

// disturbed reports whether what is to happen has happened.
func (s *scene) disturbed() bool {
	select {
	case <-s.struck:
		return true
	default:
		return false
	}
}

// wantSuccess requires that there is no error, unless something has happened.
func (s *scene) wantSuccess(err error) {
	s.t.Helper()
	if err != nil && !s.disturbed() {
		s.t.Error(err)
	}
}

// start opens the manager and recovers. Where a file operation failed it tries
// again, as the service does.
func (s *scene) start() {
	s.t.Helper()
	err := s.process.open()
	if errors.Is(err, syscall.EIO) {
		err = s.process.open()
	}
	s.wantSuccess(err)
	if err != nil {
		return
	}
	_, err = s.process.manager.Recover(s.ctx)
	if errors.Is(err, syscall.EIO) {
		_, err = s.process.manager.Recover(s.ctx)
	}
	s.wantSuccess(err)
}

// stop closes the manager, if it was opened.
func (s *scene) stop() {
	s.t.Helper()
	if s.process.manager != nil {
		s.wantSuccess(s.process.manager.Close(s.ctx))
	}
}

// attach attaches a VDI and reads it; nil means that something has happened.
func (s *scene) attach(n int) *vdi.Disk {
	s.t.Helper()
	if s.process.manager == nil || s.ctx.Err() != nil {
		return nil
	}
	session := s.process.client.Bind(xapi.SessionRef(s.host.NewSession(xapitest.RoleVMAdmin)))
	d, err := s.process.manager.Attach(s.ctx, session, s.vdis[n])
	s.wantSuccess(err)
	if err != nil {
		s.waitGone(s.vdis[n])
		return nil
	}
	got := make([]byte, d.Size())
	_, err = d.ReadAt(got, 0)
	do(s.t, err)
	if !bytes.Equal(got, s.content) {
		s.t.Error("the disk's content differs from the image's")
	}
	return d
}

// detach ends what attach began, and waits for that.
func (s *scene) detach(d *vdi.Disk) {
	if d != nil {
		leave(d)
		s.waitGone(d.CanonicalName()[1:])
	}
}

// waitGone waits for the end of a detach, which a power cut prevents.
func (s *scene) waitGone(vdiUUID string) {
	select {
	case <-s.process.manager.Gone(vdiUUID):
	case <-s.ctx.Done():
	}
}

// watch looks at every step of the process: the rule must be kept, and at one
// point something happens.
func (s *scene) watch() {
	s.files.OnOp(func(op vdi.FileOp) error {
		if !s.reached(s.numbered(false, op.N, op.What), op.After) {
			return nil
		}
		close(s.struck)
		if s.failure == nil {
			s.cut()
		}
		return s.failure
	})
	s.host.OnCall(s.onCall)
}

func (s *scene) onCall(c xapitest.CallPoint) xapitest.Verdict {
	if c.Method == "VBD.plug" && !c.After {
		s.beginPlug()
	}
	this := s.numbered(true, c.N, c.Method)
	if !s.reached(this, c.After) {
		if this == s.at.step && s.at.when == late {
			close(s.executed)
		}
		return xapitest.Proceed
	}
	close(s.struck)
	s.cut()
	switch s.at.when {
	case before:
		return xapitest.Drop
	case late:
		<-s.held
	}
	return xapitest.Proceed
}

// cut cuts the power. It is called by the one step that is under way.
func (s *scene) cut() {
	s.process.cut()
	s.die()
}

// reached notes a step, holds it against the rule, and reports whether this is
// the point.
func (s *scene) reached(this step, isAfter bool) bool {
	s.checkWriteAhead(this, isAfter)
	if !isAfter {
		s.mu.Lock()
		s.steps[this.call] = append(s.steps[this.call], this)
		s.mu.Unlock()
	}
	return this == s.at.step && isAfter == (s.at.when == after)
}

// beginPlug notes whose plug begins: nothing else is going on, so that all VBDs
// of ours are plugged or about to be.
func (s *scene) beginPlug() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, v := range s.host.VBDs() {
		s.begun[v.UUID] = true
	}
}

// checkWriteAhead is the rule: a VBD that is or may be plugged is in the journal,
// on the disk and not only in its cache. Its tag would find it as well, so no
// recovery can show a missing fsync.
func (s *scene) checkWriteAhead(this step, isAfter bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	journal := s.files.DurableJournal(memStateDir)
	for _, v := range s.host.VBDs() {
		if v.UUID == s.foreign || !v.CurrentlyAttached && !s.begun[v.UUID] {
			continue
		}
		if !slices.Contains(journal, v.UUID) {
			s.t.Errorf("at %+v, after it: %t: VBD %s is or may be plugged, and a power cut takes it out of the journal", this, isAfter, v.UUID)
		}
	}
}

// wantClean requires that nothing of ours is left, and all that is not ours.
func (s *scene) wantClean() {
	s.t.Helper()
	vbds := s.host.VBDs()
	if len(vbds) != 1 || vbds[0].UUID != s.foreign || !vbds[0].CurrentlyAttached {
		s.t.Errorf("VBDs: got %+v, want the foreign one, plugged", vbds)
	}
	if journal := s.files.Journal(memStateDir); len(journal) != 0 {
		s.t.Errorf("journal: got %q, want it empty", journal)
	}
	if creates := s.files.Creates(memStateDir); len(creates) != 0 {
		s.t.Errorf("pending calls of VBD.create: got %q, want none", creates)
	}
}
