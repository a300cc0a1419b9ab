package vdi_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"xapi-nbd/xapi"
	"xapi-nbd/xapi/xapitest"
)

// hangCreate begins an attach whose VBD.create hangs in xapi, and breaks its connection.
// It returns the client's session, and a function that lets the call go on.
func (f *fixture) hangCreate() (session string, release func()) {
	f.t.Helper()
	release = f.block("VBD.create")
	session = f.host.NewSession(xapitest.RoleVMAdmin)
	failed := make(chan error)
	go func() {
		_, err := f.manager.Attach(f.t.Context(), f.client.Bind(xapi.SessionRef(session)), f.vdi)
		failed <- err
	}()
	f.wait("VBD.create", f.called("VBD.create", 1))
	f.host.DropConnections()
	if err := <-failed; !isTransport(err) {
		f.t.Errorf("got %v, want the lost connection", err)
	}
	f.waitLeftovers(1)
	return session, release
}

// wantPendingCreate requires that a recovery leaves the call of VBD.create.
func (f *fixture) wantPendingCreate(when string) {
	f.t.Helper()
	got, err := f.manager.Recover(f.t.Context())
	if err == nil || len(got.Left) != 1 || got.Left[0].VBD != "" {
		f.t.Errorf("%s: got %+v, %v, want the call left", when, got, err)
	}
	if f.creates() == "" {
		f.t.Errorf("%s: the call is forgotten", when)
	}
}

// creates returns the list of the calls of VBD.create that may be executed.
func (f *fixture) creates() string {
	f.t.Helper()
	data, err := os.ReadFile(filepath.Join(f.stateDir, "VBD_creates_pending"))
	if err != nil && !os.IsNotExist(err) {
		f.t.Fatal(err)
	}
	return string(data)
}

// A restart of xapi ends a VBD.create that was not answered: then, and not before, the
// call is forgotten.
func TestCreateEndsWithARestart(t *testing.T) {
	f := newFixture(t)
	session, _ := f.hangCreate()
	f.wantPendingCreate("while xapi has the call")
	f.host.ExpireSession(session) // the call has passed the check of its session
	f.wantPendingCreate("when the client has logged out")
	f.host.LoseReply("session.get_uuid")
	f.wantPendingCreate("after an answer was lost")
	f.host.Restart()
	f.recover()
	if got := f.creates(); got != "" {
		t.Errorf("after the restart: got %q, want the call forgotten", got)
	}
	f.closeManager() // nothing is left
	f.wantClean()
}

// A restart of xapi before the call does not end the call, although the service may notice
// the restart only afterwards.
func TestCreateAfterARestart(t *testing.T) {
	f := newFixture(t)
	leave(f.attach(f.session(xapitest.RoleVMAdmin))) // there is a local session now
	f.wait("the end of the attachment", noVBDs)
	f.host.ResetCalls()
	f.host.ResetEvents()
	f.host.Restart()
	_, release := f.hangCreate()
	f.wantPendingCreate("restart before the call")
	release()
	f.wait("the late VBD to come", f.happened("created"))
	f.wait("the late VBD to go", noVBDs)
	f.closeManager()
	f.wantClean()
}

// The next process cannot notice a restart of xapi before its first check, only those after
// it.
func TestCreateOfAnEarlierProcess(t *testing.T) {
	f := newFixture(t)
	f.closeManager()
	line := fmt.Sprintf("nonce %d %s\n", time.Now().Unix(), f.vdi)
	do(t, os.WriteFile(filepath.Join(f.stateDir, "VBD_creates_pending"), []byte(line), 0o600))
	f.manager = f.open()
	f.wantPendingCreate("first look")
	f.wantPendingCreate("second look")
	f.host.Restart()
	f.recover()
	if got := f.creates(); got != "" {
		t.Errorf("after the restart: got %q, want the call forgotten", got)
	}
	f.closeManager()
	if n := f.host.Sessions(); n != 0 {
		t.Errorf("sessions left: got %d, want 0", n)
	}
}
