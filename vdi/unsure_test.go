package vdi_test

import (
	"errors"
	"runtime"
	"testing"

	"xapi-nbd/vdi"
	"xapi-nbd/xapi"
	"xapi-nbd/xapi/xapitest"
)

// The response to VBD.plug is lost but the plug succeeds: the VBD's record shows it, and the
// client is served.
func TestPlugAnswerLost(t *testing.T) {
	f := newFixture(t)
	f.host.LoseReply("VBD.plug")
	d := f.attach(f.session(xapitest.RoleVMAdmin))
	f.wantContent(d)
	if n := f.count("VBD.plug"); n != 1 {
		t.Errorf("VBD.plug: got %d calls, want 1", n)
	}
	leave(d)
	f.closeManager()
	f.wantClean()
}

// xapi restarts during a plug. The operation of the storage manager goes on, and the client's
// session ends.
func TestRestartInMidPlug(t *testing.T) {
	f := newFixture(t)
	working, release := f.blockWork("plug")
	attached := make(chan *vdi.Disk)
	go func() { attached <- f.attach(f.session(xapitest.RoleVMAdmin)) }()
	<-working
	f.host.Restart()
	f.wait("somebody to ask", f.called("VBD.get_record", 1))
	release()
	d := <-attached
	f.wantContent(d)
	leave(d)
	f.closeManager()
	f.wantClean()
}

// The response to VBD.plug is lost and the plug fails.
func TestPlugFailsAndAnswerLost(t *testing.T) {
	f := newFixture(t)
	f.host.Fail("VBD.plug", "SR_BACKEND_FAILURE_46", "", "no", "")
	f.host.LoseReply("VBD.plug")
	if _, err := f.manager.Attach(t.Context(), f.session(xapitest.RoleVMAdmin), f.vdi); !isTransport(err) {
		t.Errorf("got %v, want the lost connection", err)
	}
	f.closeManager()
	f.wantClean()
}

// An unplug whose response was lost is still in progress: the detach waits for it and does not
// repeat it.
func TestUnplugAnswerLost(t *testing.T) {
	f := newFixture(t)
	d := f.attach(f.session(xapitest.RoleVMAdmin))
	working, release := f.blockWork("unplug")
	leave(d)
	<-working
	asked := f.count("VBD.get_record")
	f.host.DropConnections()
	f.wait("two questions", f.called("VBD.get_record", asked+2))
	release()
	f.closeManager()
	if n := f.count("VBD.unplug"); n != 1 {
		t.Errorf("VBD.unplug: got %d calls, want 1", n)
	}
	f.wantClean()
}

// Recover waits until a plug of an earlier process is complete, and then undoes it.
func TestRecoverWaitsForAPlug(t *testing.T) {
	f := newFixture(t)
	uuid, err := f.host.AddForeignVBD(f.vdi, map[string]string{"xapi-nbd": f.host.InstallationUUID() + " nonce"})
	do(t, err)
	root := f.session(xapitest.RoleRoot)
	ref, err := root.VBDByUUID(t.Context(), uuid)
	do(t, err)
	working, release := f.blockWork("plug")
	plugged := make(chan error)
	go func() { plugged <- root.PlugVBD(t.Context(), ref) }()
	<-working
	got, err := f.manager.Recover(t.Context())
	if err == nil || len(got.Left) != 1 {
		t.Errorf("recovery during the plug: got %+v, %v, want the VBD left", got, err)
	}
	if n := f.count("VBD.unplug"); n != 0 {
		t.Errorf("VBD.unplug: got %d calls, want none during the plug", n)
	}
	release()
	do(t, <-plugged)
	f.recover()
	f.closeManager()
	f.wantClean()
}

// A create that is executed after its connection broke is found by its tag.
func TestCreateExecutedLate(t *testing.T) {
	f := newFixture(t)
	release := f.block("VBD.create")
	failed := make(chan error)
	go func() {
		_, err := f.manager.Attach(t.Context(), f.session(xapitest.RoleVMAdmin), f.vdi)
		failed <- err
	}()
	f.wait("VBD.create", f.called("VBD.create", 1))
	f.host.DropConnections()
	if err := <-failed; !isTransport(err) {
		t.Errorf("got %v, want the lost connection", err)
	}
	f.waitLeftovers(1)
	got, err := f.manager.Recover(t.Context())
	if err == nil || len(got.Left) != 1 || got.Left[0].VBD != "" || got.Left[0].VDI != f.vdi {
		t.Errorf("before it is executed: got %+v, %v, want the call left", got, err)
	}
	release()
	f.wait("the late VBD to come", f.happened("created"))
	f.wait("the removal of the late VBD", noVBDs) // without another call
	f.closeManager()
	f.wantClean()
}

// A detach that fails is tried again, and meanwhile Leftovers lists the VBD.
func TestDetachFails(t *testing.T) {
	f := newFixture(t)
	d := f.attach(f.session(xapitest.RoleVMAdmin))
	f.host.FailAlways("VBD.unplug", "INTERNAL_ERROR", "no")
	uuid := f.host.VBDs()[0].UUID
	leave(d)
	f.waitLeftovers(1)
	got, err := f.manager.Recover(t.Context())
	if !errors.Is(err, xapi.InternalError) || len(got.Left) != 1 || got.Left[0].VBD != uuid {
		t.Fatalf("got %+v, %v, want the VBD left and xapi's error", got, err)
	}
	left := f.manager.Leftovers()
	if len(left) != 1 || left[0].VBD != uuid || left[0].VDI != f.vdi || left[0].Attempts < 2 ||
		left[0].LastError == "" || left[0].Since.IsZero() {
		t.Errorf("leftovers: got %+v", left)
	}
	f.host.ClearFaults()
	f.closeManager() // waits for it
	f.wantClean()
}

// waitLeftovers waits until the manager knows of n leftovers.
func (f *fixture) waitLeftovers(n int) {
	f.t.Helper()
	for len(f.manager.Leftovers()) != n {
		if f.t.Context().Err() != nil {
			f.t.Fatal("the test has ended")
		}
		runtime.Gosched() // there is no event to wait for
	}
}

// happened returns a condition: whether a VBD has had a change, see xapitest.Event.
func (f *fixture) happened(change string) func([]xapitest.VBD) bool {
	return func([]xapitest.VBD) bool {
		for _, e := range f.host.Events() {
			if e.Change == change {
				return true
			}
		}
		return false
	}
}
