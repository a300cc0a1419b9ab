package vdi_test

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"syscall"

	"xapi-nbd/internal/fsys/memfs"
	"xapi-nbd/vdi"
	"xapi-nbd/xapi/xapitest"
)

// outside runs functions that are not in the bubble of fake time: the channels
// and goroutines that the simulated host makes meanwhile must not belong to it.
type outside struct {
	mu   sync.Mutex // one at a time
	work chan func()
	done chan struct{}
}

// newOutside must be called outside. The caller closes work.
func newOutside() *outside {
	o := &outside{work: make(chan func()), done: make(chan struct{})}
	go func() {
		for f := range o.work {
			f()
			o.done <- struct{}{}
		}
	}()
	return o
}

func (o *outside) do(f func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.work <- f
	<-o.done
}

// event is something that happens at the next call of a method.
type event struct {
	method string
	after  bool // or before
	kind   eventKind
	code   string // of failCall
}

type eventKind int

const (
	breakConnection eventKind = iota // before: the call is not executed; after: its response is lost
	failCall                         // before
	restartXapi
	stopXapi
	killService
	unplugOurs // another client of xapi unplugs a VBD of this service
	destroyOurs
)

func (k eventKind) String() string {
	return [...]string{"breakConnection", "failCall", "restartXapi", "stopXapi", "killService", "unplugOurs", "destroyOurs"}[k]
}

// fileEvent is something that happens in one of the next file operations.
type fileEvent struct {
	in    int // operations from now, from 1; 0 means never
	after bool
	fail  bool // EIO; else the service is killed
}

// spy observes all calls that reach the host and all file operations of the service. It
// makes events happen there, and keeps the possible results of them.
type spy struct {
	host *xapitest.Host
	out  *outside

	mu        sync.Mutex // guards all below
	idle      *sync.Cond // signaled when calls is 0
	service   *service   // the one that runs
	calls     int        // under way, of those that outlive their connection
	events    []event
	failing   int // the call that is being made to fail
	file      fileEvent
	fileNow   bool            // the file event is that of the operation under way
	down      bool            // xapi is stopped
	stopped   bool            // xapi is or was stopped
	killed    bool            // the service was cut off
	restarts  int             // of xapi
	plugged   map[string]bool // VBDs of this service that were plugged at some time
	disturbed map[string]bool // VDIs of which another client has unplugged a VBD of this service
	excused   int             // local sessions that the service cannot end any more
	known     bool            // excused counts all of them
	wrong     string          // the first rule that was broken
}

func newSpy(host *xapitest.Host, out *outside) *spy {
	s := &spy{host: host, out: out, plugged: make(map[string]bool), disturbed: make(map[string]bool), known: true}
	s.idle = sync.NewCond(&s.mu)
	host.OnCall(s.onCall)
	return s
}

// with calls f with mu locked.
func (s *spy) with(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

// calm reports whether xapi runs and no event is prepared.
func (s *spy) calm() (calm bool) {
	s.with(func() { calm = !s.down && len(s.events) == 0 && s.file.in == 0 && !s.fileNow })
	return calm
}

// waitIdle waits for the calls that go on after their connection was lost. It must be called
// outside.
func (s *spy) waitIdle() {
	s.with(func() {
		for s.calls > 0 {
			s.idle.Wait()
		}
	})
}

// onCall is called on the host's goroutines.
func (s *spy) onCall(c xapitest.CallPoint) xapitest.Verdict {
	verdict := xapitest.Proceed
	lasts := slices.Contains(lasting, c.Method)
	fresh := ""
	if lasts {
		fresh = s.look(fmt.Sprintf("%s, after it: %t", c.Method, c.After))
	}
	if e, ok := s.take(c); ok {
		s.excuse(e)
		verdict = s.happen(e, c, fresh)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.After && c.N == s.failing { // it may have failed for another reason
		s.failing = 0
		s.host.ClearFaults()
	}
	switch {
	case !lasts:
	case c.After:
		s.calls--
		s.idle.Broadcast()
	case verdict == xapitest.Proceed:
		s.calls++
	}
	return verdict
}

// take returns the event of a call, which then happens once.
func (s *spy) take(c xapitest.CallPoint) (event, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.events, func(e event) bool { return e.method == c.Method && e.after == c.After })
	if i < 0 {
		return event{}, false
	}
	e := s.events[i]
	s.events = slices.Delete(s.events, i, i+1)
	return e, true
}

// happen executes an event at a call. fresh is the VBD that the call has just plugged, if
// any.
func (s *spy) happen(e event, c xapitest.CallPoint, fresh string) xapitest.Verdict {
	switch e.kind {
	case breakConnection:
		return xapitest.Drop
	case failCall:
		s.with(func() { s.failing = c.N })
		s.host.Fail(e.method, e.code, "made to fail")
	case restartXapi:
		s.restart()
	case stopXapi:
		s.stop()
	case killService:
		s.kill()
		if !e.after {
			return xapitest.Drop
		}
	case unplugOurs:
		s.interfere(fresh, s.host.UnplugVBD)
	case destroyOurs:
		s.interfere(s.detached(), s.host.DestroyVBD)
	}
	return xapitest.Proceed
}

// excuse counts the local sessions that the service cannot end after an event.
func (s *spy) excuse(e event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case e.kind == stopXapi, e.kind == killService, e.kind == restartXapi:
		s.known = false // another call may be a login whose answer is lost
	case e.kind == breakConnection && e.after && e.method == "session.login_with_password",
		e.kind == breakConnection && !e.after && e.method == "session.logout",
		e.kind == failCall && e.method == "session.logout":
		s.excused++
	}
}

// restart ends all sessions. This and the following methods must be called outside.
func (s *spy) restart() {
	s.with(func() { s.restarts++ })
	s.host.Restart()
}

func (s *spy) stop() {
	s.with(func() { s.down, s.stopped = true, true })
	s.host.Stop()
}

// kill cuts the service off.
func (s *spy) kill() {
	var victim *service
	s.with(func() { victim, s.killed, s.known = s.service, true, false })
	victim.cut()
}

// interfere changes a VBD of this service as another client of xapi.
func (s *spy) interfere(uuid string, do func(context.Context, string) error) error {
	for _, v := range s.host.VBDs() {
		if v.UUID == uuid {
			s.with(func() { s.disturbed[v.VDI] = true })
			return do(context.Background(), uuid)
		}
	}
	return nil
}

// detached returns the newest VBD of ours that is not attached, or "".
func (s *spy) detached() (uuid string) {
	for _, v := range s.host.VBDs() {
		if !v.Foreign && !v.CurrentlyAttached {
			uuid = v.UUID
		}
	}
	return uuid
}

// look checks two rules. A VBD that is or was plugged is in the journal, durably, as long as
// it exists. A VBD that was not plugged yet is in the journal, or its call is in the list of
// VBD.create. look returns a VBD that was not plugged at the last look, or "".
func (s *spy) look(where string) (fresh string) {
	s.lookForUnknown(where)
	var files *vdi.MemFS
	var plugged map[string]bool
	s.with(func() { files, plugged = s.service.files, maps.Clone(s.plugged) })
	// The service may be at work: an entry that is durable now is in the list from
	// before or in that from after.
	journal := files.DurableJournal(memStateDir)
	vbds := s.host.VBDs()
	journal = append(journal, files.DurableJournal(memStateDir)...)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, v := range vbds {
		if v.Foreign || !v.CurrentlyAttached && !plugged[v.UUID] {
			continue
		}
		if !s.plugged[v.UUID] {
			fresh, s.plugged[v.UUID] = v.UUID, true
		}
		if s.wrong == "" && !slices.Contains(journal, v.UUID) {
			s.wrong = fmt.Sprintf("at %s: a power cut takes VBD %s out of the journal: %+v", where, v.UUID, v)
		}
	}
	return fresh
}

// lookForUnknown searches for VBDs of this service that no list would have after a power cut.
// The service may be running, but a VBD that exists before and after the lists were read
// must be in one of them.
func (s *spy) lookForUnknown(where string) {
	var files *vdi.MemFS
	s.with(func() { files = s.service.files })
	before := s.host.VBDs()
	creates, journal := files.DurableCreates(memStateDir), files.DurableJournal(memStateDir)
	after := s.host.VBDs()
	for _, v := range before {
		exists := slices.ContainsFunc(after, func(o xapitest.VBD) bool { return o.UUID == v.UUID })
		tag := strings.Fields(v.OtherConfig["xapi-nbd"])
		if v.Foreign || !exists || len(tag) < 2 || slices.Contains(journal, v.UUID) || slices.Contains(creates, tag[1]) {
			continue
		}
		s.with(func() {
			if s.wrong == "" {
				s.wrong = fmt.Sprintf("at %s: a power cut makes VBD %s unknown: %+v", where, v.UUID, v)
			}
		})
	}
}

// onFile is called before and after each file operation of the service, in the
// bubble.
func (s *spy) onFile(op memfs.Op) error {
	s.mu.Lock()
	if !op.After && s.file.in > 0 {
		s.file.in--
		s.fileNow = s.file.in == 0
	}
	strikes := s.fileNow && op.After == s.file.after
	if strikes {
		s.fileNow = false
	}
	fail := s.file.fail
	s.mu.Unlock()
	switch {
	case !strikes:
		return nil
	case fail:
		return syscall.EIO
	}
	s.out.do(s.kill)
	return nil
}
