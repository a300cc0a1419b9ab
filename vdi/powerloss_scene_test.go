package vdi_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"

	"xapi-nbd/internal/fsys/memfs"
	"xapi-nbd/vdi"
	"xapi-nbd/xapi"
	"xapi-nbd/xapi/xapitest"
)

// scene is a host on which one process runs after the other.
type scene struct {
	t       *testing.T
	host    *xapitest.Host
	content []byte
	vdis    []string // uuids
	foreign string   // uuid of a VBD of another tool
	files   *vdi.MemFS
	process *process
	ctx     context.Context // of the first process; ends when the power is cut
	die     func()

	at       point         // where the power is cut or an operation fails; zero means nowhere
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

// end closes the host. Further calls do nothing.
func (s *scene) end() {
	s.release() // else Close would wait for the call
	s.die()
	s.process.cut()
	s.process.bury()
	if err := s.host.Close(); err != nil {
		s.t.Error(err)
	}
}

// leaveBehind makes the leftovers of earlier processes: VBDs of the journal that are plugged,
// not plugged, and gone, and one that is only tagged.
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

// disturbed reports whether the power was cut or the operation has failed.
func (s *scene) disturbed() bool {
	select {
	case <-s.struck:
		return true
	default:
		return false
	}
}

// wantSuccess requires that there is no error, unless the scene is disturbed.
func (s *scene) wantSuccess(err error) {
	s.t.Helper()
	if err != nil && !s.disturbed() {
		s.t.Error(err)
	}
}

// start opens the manager and recovers. After a file operation that failed it tries again,
// as the service does.
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

// canAttach reports whether there is a process that can attach VDIs.
func (s *scene) canAttach() bool { return s.process.manager != nil && s.ctx.Err() == nil }

func (s *scene) session() *xapi.Session {
	return s.process.client.Bind(xapi.SessionRef(s.host.NewSession(xapitest.RoleVMAdmin)))
}

// attach attaches a VDI and reads it. It returns nil if the scene is disturbed.
func (s *scene) attach(n int) *vdi.Disk {
	s.t.Helper()
	if !s.canAttach() {
		return nil
	}
	d, err := s.process.manager.Attach(s.ctx, s.session(), s.vdis[n])
	s.wantSuccess(err)
	if err != nil {
		s.waitGone(s.vdis[n])
		return nil
	}
	s.read(d)
	return d
}

// write attaches a VDI for writing, writes the content that it has already, and reads it. It
// returns nil if the scene is disturbed.
func (s *scene) write(n int) *vdi.Disk {
	s.t.Helper()
	if !s.canAttach() {
		return nil
	}
	d, err := s.process.manager.AttachWritable(s.ctx, s.session(), s.vdis[n])
	s.wantSuccess(err)
	if err != nil {
		s.waitGone(s.vdis[n])
		return nil
	}
	_, err = d.WriteAt(s.content[1000:], 1000)
	do(s.t, err)
	do(s.t, d.Flush())
	s.read(d.Disk)
	return d.Disk
}

// read requires that the disk has its content.
func (s *scene) read(d *vdi.Disk) {
	s.t.Helper()
	got := make([]byte, d.Size())
	_, err := d.ReadAt(got, 0)
	do(s.t, err)
	if !bytes.Equal(got, s.content) {
		s.t.Error("the disk's content differs from the image's")
	}
}

// detach closes the disk and waits for the detach.
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

// watch observes every step of the process: it checks the rule, and cuts the power or makes
// an operation fail at the point.
func (s *scene) watch() {
	s.files.OnOp(func(op memfs.Op) error {
		if !s.reached(s.numbered(false, op.N, op.Name), op.After) {
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

// cut cuts the power. It is called during a step.
func (s *scene) cut() {
	s.process.cut()
	s.die()
}

// reached records a step, checks the rule, and reports whether this is the point.
func (s *scene) reached(this step, isAfter bool) bool {
	s.checkWriteAhead(this, isAfter)
	if !isAfter {
		s.mu.Lock()
		s.steps[this.call] = append(s.steps[this.call], this)
		s.mu.Unlock()
	}
	return this == s.at.step && isAfter == (s.at.when == after)
}

// beginPlug records the beginning of a plug. There are no other calls then, so all VBDs of
// this service are plugged or being plugged.
func (s *scene) beginPlug() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, v := range s.host.VBDs() {
		s.begun[v.UUID] = true
	}
}

// checkWriteAhead checks the rule: a VBD that is or may be plugged is in the journal, durably.
// Recover would also find it by its tag, so the result of a recovery does not show a missing
// fsync.
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

// wantClean requires that no VBD and no entry of this service is left, and that the VBD of the
// other tool is unchanged.
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
