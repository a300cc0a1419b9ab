package vdi_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"xapi-nbd/vdi"
	"xapi-nbd/xapi"
	"xapi-nbd/xapi/xapitest"
)

func TestAttachServesTheDisk(t *testing.T) {
	f := newFixture(t)
	d := f.attach(f.session(xapitest.RoleVMAdmin))
	f.wantContent(d)
	if min, _, _ := d.BlockSizes(); min != 512 {
		t.Errorf("minimum block size: got %d, want 512", min)
	}
	if got, want := d.CanonicalName(), "/"+f.vdi; got != want {
		t.Errorf("canonical name: got %q, want %q", got, want)
	}
	if got := d.Description(); !strings.Contains(got, "a disk") || !strings.Contains(got, f.vdi) {
		t.Errorf("description %q names neither uuid nor label", got)
	}
	vbds := f.host.VBDs()
	if len(vbds) != 1 || !vbds[0].CurrentlyAttached {
		t.Fatalf("VBDs: got %+v, want one that is attached", vbds)
	}
	if got, want := f.journal(), vbds[0].UUID+"\n"; got != want {
		t.Errorf("journal: got %q, want %q", got, want)
	}
	d.Close()
	f.closeManager()
	f.wantClean()
}

// The journal entry is durable before the plug, and stays until the VBD is
// destroyed.
func TestJournalSurroundsThePlug(t *testing.T) {
	f := newFixture(t)
	releasePlug := f.block("VBD.plug")
	releaseDestroy := f.block("VBD.destroy")
	attached := make(chan *vdi.Disk)
	go func() { attached <- f.attach(f.session(xapitest.RoleVMAdmin)) }()
	f.wait("VBD.plug", f.called("VBD.plug", 1))
	entry := f.host.VBDs()[0].UUID + "\n"
	if got := f.journal(); got != entry {
		t.Errorf("journal before the plug: got %q, want %q", got, entry)
	}
	releasePlug()
	(<-attached).Close()
	f.wait("VBD.destroy", f.called("VBD.destroy", 1))
	if got := f.journal(); got != entry {
		t.Errorf("journal before the destroy: got %q, want %q", got, entry)
	}
	releaseDestroy()
	f.closeManager()
	f.wantClean()
}

// VBD.create and VBD.plug run with the client's session, so that its role is checked. The
// calls that undo them use a local session.
func TestSessionsOfCalls(t *testing.T) {
	f := newFixture(t)
	f.attach(f.session(xapitest.RoleVMAdmin)).Close()
	f.closeManager()
	for _, c := range f.host.Calls() {
		switch c.Method {
		case "VBD.create", "VBD.plug":
			if c.Local {
				t.Errorf("%s ran with a local session", c.Method)
			}
		case "VBD.unplug", "VBD.destroy":
			if !c.Local {
				t.Errorf("%s ran with the client's session", c.Method)
			}
		}
	}
	if n := f.host.Sessions(); n != 0 {
		t.Errorf("local sessions that were not logged out: got %d, want 0", n)
	}
}

func TestConnectionsShareAnAttachment(t *testing.T) {
	f := newFixture(t)
	s1, s2 := f.session(xapitest.RoleVMAdmin), f.session(xapitest.RoleRoot)
	disks := make([]*vdi.Disk, 8)
	var wg sync.WaitGroup
	for i := range disks {
		s := s1
		if i%2 == 1 {
			s = s2
		}
		wg.Go(func() { disks[i], _ = f.manager.Attach(t.Context(), s, f.vdi) })
	}
	wg.Wait()
	if n := f.count("VBD.create"); n != 1 {
		t.Errorf("VBD.create: got %d calls, want 1", n)
	}
	for i, d := range disks {
		if d == nil {
			t.Fatal("an attach failed")
		}
		if i > 0 {
			d.Close()
			d.Close() // a second time means nothing
		}
	}
	f.wantContent(disks[0]) // still attached for the last user
	disks[0].Close()
	f.closeManager()
	f.wantClean()
}

func TestAttachRefused(t *testing.T) {
	small := func(c *vdi.Config) { c.MaxVBDs = 1 }
	tests := []struct {
		name    string
		prepare func(f *fixture) *xapi.Session
		check   func(error) bool
	}{
		{"role", func(f *fixture) *xapi.Session { return f.session(xapitest.RoleReadOnly) },
			func(err error) bool { return errors.Is(err, xapi.RBACPermissionDenied) }},
		{"dead session", func(f *fixture) *xapi.Session { return f.client.Bind("OpaqueRef:dead") },
			func(err error) bool { return errors.Is(err, xapi.SessionInvalid) }},
		{"no such VDI", func(f *fixture) *xapi.Session {
			f.vdi = "00000000-0000-0000-0000-000000000000"
			return f.session(xapitest.RoleVMAdmin)
		}, func(err error) bool { return errors.Is(err, xapi.UUIDInvalid) }},
		{"no PBD", func(f *fixture) *xapi.Session {
			f.vdi = f.addVDI(xapitest.VDISpec{Size: 1 << 20, NoPBD: true})
			return f.session(xapitest.RoleVMAdmin)
		}, func(err error) bool { return errors.Is(err, xapi.SRHasNoPBDs) }},
		{"plug fails", func(f *fixture) *xapi.Session {
			f.host.Fail("VBD.plug", "SR_BACKEND_FAILURE_46", "", "The VDI is not available", "")
			return f.session(xapitest.RoleVMAdmin)
		}, func(err error) bool { return strings.Contains(err.Error(), "SR_BACKEND_FAILURE_46") }},
		{"uuid of the VBD not told", func(f *fixture) *xapi.Session {
			f.host.Fail("VBD.get_uuid", "INTERNAL_ERROR", "no")
			return f.session(xapitest.RoleVMAdmin)
		}, func(err error) bool { return errors.Is(err, xapi.InternalError) }},
		{"journal cannot be written", func(f *fixture) *xapi.Session {
			if err := os.Mkdir(filepath.Join(f.stateDir, "VBDs_to_clean_up.new"), 0o700); err != nil {
				f.t.Fatal(err)
			}
			return f.session(xapitest.RoleVMAdmin)
		}, func(err error) bool { return strings.Contains(err.Error(), "journal") }},
		{"reply of create lost", func(f *fixture) *xapi.Session {
			f.host.LoseReply("VBD.create")
			return f.session(xapitest.RoleVMAdmin)
		}, isTransport},
		{"plug never arrived", func(f *fixture) *xapi.Session {
			f.host.DropConnection("VBD.plug")
			return f.session(xapitest.RoleVMAdmin)
		}, isTransport},
		{"limit", func(f *fixture) *xapi.Session {
			other := f.addVDI(xapitest.VDISpec{Size: 1 << 20})
			d, err := f.manager.Attach(f.t.Context(), f.session(xapitest.RoleVMAdmin), other)
			if err != nil {
				f.t.Fatal(err)
			}
			f.t.Cleanup(func() { d.Close(); f.wait("the other VBD to go", noVBDs) })
			return f.session(xapitest.RoleVMAdmin)
		}, func(err error) bool { return strings.Contains(err.Error(), "max_vbds is 1") }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(t, small)
			s := tt.prepare(f)
			d, err := f.manager.Attach(t.Context(), s, f.vdi)
			if err == nil {
				d.Close()
				t.Fatal("got no error")
			}
			if !tt.check(err) {
				t.Errorf("got error %v", err)
			}
			if tt.name != "limit" {
				f.closeManager()
				f.wantClean()
			}
		})
	}
}

func isTransport(err error) bool {
	var lost *xapi.TransportError
	return errors.As(err, &lost)
}

// If a client gives up while its plug hangs, the plug is undone when it completes.
func TestPlugOutlivesItsClient(t *testing.T) {
	f := newFixture(t)
	release := f.block("VBD.plug")
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("the client hung up")
	failed := make(chan error)
	go func() {
		_, err := f.manager.Attach(ctx, f.session(xapitest.RoleVMAdmin), f.vdi)
		failed <- err
	}()
	f.wait("VBD.plug", f.called("VBD.plug", 1))
	cancel(gone)
	if err := <-failed; !errors.Is(err, gone) {
		t.Errorf("got error %v, want the cause of the context's end", err)
	}
	release()
	f.wait("the VBD to go", noVBDs)
	f.closeManager()
	f.wantClean()
}

func TestAttachTimeout(t *testing.T) {
	f := newFixture(t, func(c *vdi.Config) { c.AttachTimeout = time.Millisecond })
	release := f.block("VBD.plug")
	_, err := f.manager.Attach(t.Context(), f.session(xapitest.RoleVMAdmin), f.vdi)
	if !errors.Is(err, vdi.ErrStillAttaching) {
		t.Errorf("got error %v, want ErrStillAttaching", err)
	}
	release()
	f.closeManager()
	f.wantClean()
}

// A client that comes while an abandoned plug is under way takes it over.
func TestAbandonedPlugIsTakenOver(t *testing.T) {
	f := newFixture(t)
	release := f.block("VBD.plug")
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error)
	go func() {
		_, err := f.manager.Attach(ctx, f.session(xapitest.RoleVMAdmin), f.vdi)
		failed <- err
	}()
	f.wait("VBD.plug", f.called("VBD.plug", 1))
	cancel()
	<-failed
	attached := make(chan *vdi.Disk)
	go func() { attached <- f.attach(f.session(xapitest.RoleVMAdmin)) }()
	for f.manager.Users(f.vdi) == 0 {
		runtime.Gosched() // nothing tells when it has joined
	}
	release()
	d := <-attached
	f.wantContent(d)
	if n := f.count("VBD.plug"); n != 1 {
		t.Errorf("VBD.plug: got %d calls, want 1", n)
	}
	d.Close()
	f.closeManager()
	f.wantClean()
}

// An attach that fails because of the first client's session does not fail for the second
// client.
func TestAttachFailsForItsOwnSessionOnly(t *testing.T) {
	f := newFixture(t)
	release := f.block("VBD.plug")
	f.host.Fail("VBD.plug", "SESSION_INVALID", "OpaqueRef:x")
	first := make(chan error)
	go func() {
		_, err := f.manager.Attach(t.Context(), f.session(xapitest.RoleVMAdmin), f.vdi)
		first <- err
	}()
	f.wait("VBD.plug", f.called("VBD.plug", 1))
	second := make(chan *vdi.Disk)
	go func() { second <- f.attach(f.session(xapitest.RoleVMAdmin)) }()
	for f.manager.Users(f.vdi) < 2 {
		runtime.Gosched() // nothing tells when it has joined
	}
	release()
	if err := <-first; !errors.Is(err, xapi.SessionInvalid) {
		t.Errorf("first: got %v, want SESSION_INVALID", err)
	}
	d := <-second
	f.wantContent(d)
	d.Close()
	f.closeManager()
	f.wantClean()
}

// A client that comes while the VDI is being detached waits for that and then
// gets a new VBD.
func TestAttachWaitsForDetach(t *testing.T) {
	f := newFixture(t)
	d := f.attach(f.session(xapitest.RoleVMAdmin))
	release := f.block("VBD.destroy")
	d.Close()
	f.wait("VBD.destroy", f.called("VBD.destroy", 1))
	attached := make(chan *vdi.Disk)
	go func() { attached <- f.attach(f.session(xapitest.RoleVMAdmin)) }()
	release()
	d = <-attached
	f.wantContent(d)
	if n := f.count("VBD.create"); n != 2 {
		t.Errorf("VBD.create: got %d calls, want 2", n)
	}
	d.Close()
	f.closeManager()
	f.wantClean()
}

// xapi supplies VBD.device, and it must not lead out of the device folder.
func TestHostileDeviceText(t *testing.T) {
	for _, device := range []string{"", "../etc/passwd", "/etc/passwd", "a/../../b", "x\x01y"} {
		if err := vdi.CheckDevice(device); err == nil {
			t.Errorf("device %q was accepted", device)
		}
	}
	for _, device := range []string{"xvda", "nbd0", "sm/backend/11111111-1111-1111-1111-111111111111/x"} {
		if err := vdi.CheckDevice(device); err != nil {
			t.Errorf("device %q: %v", device, err)
		}
	}
}
