package vdi_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"xapi-nbd/vdi"
	"xapi-nbd/xapi"
	"xapi-nbd/xapi/xapitest"
)

// Each row makes the leftovers of a crash at one point; see the package documentation.
func TestRecoverAfterCrash(t *testing.T) {
	tests := []struct {
		name            string
		journaled, plug bool
		tagged, gone    bool
		unplugged       bool
	}{
		{name: "after create", tagged: true},
		{name: "after journal", tagged: true, journaled: true},
		{name: "plugged", tagged: true, journaled: true, plug: true},
		{name: "after unplug", tagged: true, journaled: true, plug: true, unplugged: true},
		{name: "after destroy", journaled: true, gone: true},
		{name: "of the original, plugged", journaled: true, plug: true},
		{name: "of the original, created", journaled: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(t)
			var tag map[string]string
			if tt.tagged {
				tag = map[string]string{"xapi-nbd": f.host.InstallationUUID() + " somenonce"}
			}
			uuid, err := f.host.AddForeignVBD(f.vdi, tag)
			if err != nil {
				t.Fatal(err)
			}
			root := f.session(xapitest.RoleRoot)
			ref, err := root.VBDByUUID(t.Context(), uuid)
			if err != nil {
				t.Fatal(err)
			}
			if tt.plug {
				do(t, f.host.PlugForeign(uuid))
			}
			if tt.unplugged {
				do(t, root.UnplugVBD(t.Context(), ref))
			}
			if tt.gone {
				do(t, root.DestroyVBD(t.Context(), ref))
			}
			if tt.journaled {
				f.writeJournal("\nnot a uuid\n" + uuid + "\n" + uuid + "\n")
			}
			f.recover()
			if left := f.host.VBDs(); len(left) != 0 {
				t.Errorf("left: %+v", left)
			}
			if got := strings.ReplaceAll(f.journal(), "\nnot a uuid\n", ""); got != "" {
				t.Errorf("journal: got %q, want it empty", got)
			}
			if n := f.host.Sessions(); n != 0 {
				t.Errorf("sessions left: got %d, want 0", n)
			}
		})
	}
}

func do(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// VBDs of other hosts, other tools, and of this process's own attachments are
// not touched.
func TestRecoverTouchesNothingElse(t *testing.T) {
	f := newFixture(t)
	for _, otherConfig := range []map[string]string{
		nil,
		{"owner": "somebody"},
		{"xapi-nbd": "11111111-2222-3333-4444-555555555555 nonce"}, // another host of the pool
		{"xapi-nbd": f.host.InstallationUUID()},                    // not our format
	} {
		uuid, err := f.host.AddForeignVBD(f.vdi, otherConfig)
		do(t, err)
		do(t, f.host.PlugForeign(uuid))
	}
	d := f.attach(f.session(xapitest.RoleVMAdmin))
	f.recover()
	if got := len(f.host.VBDs()); got != 5 {
		t.Errorf("VBDs: got %d, want 4 foreign ones and ours", got)
	}
	f.wantContent(d)
	d.Close()
	f.closeManager()
	if got := len(f.host.VBDs()); got != 4 {
		t.Errorf("VBDs: got %d, want the 4 foreign ones", got)
	}
}

// Recover does not remove the VBD of an attachment that is being created: the VBD exists
// before its uuid is known.
func TestRecoverDuringCreate(t *testing.T) {
	f := newFixture(t)
	release := f.block("VBD.get_uuid")
	attached := make(chan *vdi.Disk)
	go func() { attached <- f.attach(f.session(xapitest.RoleVMAdmin)) }()
	f.wait("VBD.get_uuid", f.called("VBD.get_uuid", 1))
	f.recover()
	release()
	d := <-attached
	f.wantContent(d)
	d.Close()
	f.closeManager()
	f.wantClean()
}

// One VBD that cannot be removed does not keep the others, and stays in the
// journal.
func TestRecoverGoesOn(t *testing.T) {
	f := newFixture(t)
	var uuids []string
	for range 3 {
		uuid, err := f.host.AddForeignVBD(f.vdi, nil)
		do(t, err)
		uuids = append(uuids, uuid)
	}
	f.writeJournal(strings.Join(uuids, "\n") + "\n")
	do(t, f.host.PlugForeign(uuids[2]))
	f.host.FailAlways("VBD.unplug", "INTERNAL_ERROR", "no")
	got, err := f.manager.Recover(t.Context())
	if !errors.Is(err, xapi.InternalError) {
		t.Errorf("got error %v, want xapi's", err)
	}
	slices.Sort(got.Removed)
	if len(got.Left) != 1 || got.Left[0].VBD != uuids[2] || !slices.Equal(got.Removed, slices.Sorted(slices.Values(uuids[:2]))) {
		t.Errorf("got %+v, want the last one left and the others removed", got)
	}
	if got, want := f.journal(), uuids[2]+"\n"; got != want {
		t.Errorf("journal: got %q, want the one that failed, %q", got, want)
	}
	f.host.ClearFaults()
	f.recover()
	if left := f.host.VBDs(); len(left) != 0 {
		t.Errorf("left: %+v", left)
	}
}

// A detach that fails is tried again.
func TestDetachRetries(t *testing.T) {
	tests := []struct {
		name  string
		fault func(h *xapitest.Host)
	}{
		{"unplug fails", func(h *xapitest.Host) { h.Fail("VBD.unplug", "INTERNAL_ERROR", "no") }},
		{"destroy fails", func(h *xapitest.Host) { h.Fail("VBD.destroy", "OTHER_OPERATION_IN_PROGRESS", "VBD", "x", "op", "t") }},
		{"reply of unplug lost", func(h *xapitest.Host) { h.LoseReply("VBD.unplug") }},
		{"reply of destroy lost", func(h *xapitest.Host) { h.LoseReply("VBD.destroy") }},
		{"connection dropped before unplug", func(h *xapitest.Host) { h.DropConnection("VBD.unplug") }},
		{"login refused", func(h *xapitest.Host) { h.Fail("session.login_with_password", "HOST_STILL_BOOTING") }},
		{"sessions lost", func(h *xapitest.Host) { h.Restart() }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(t)
			d := f.attach(f.session(xapitest.RoleVMAdmin))
			tt.fault(f.host)
			d.Close()
			f.closeManager()
			f.wantClean()
		})
	}
}

// Another client of xapi removes a VBD in use, as Xen Orchestra does.
func TestDetachOfARemovedVBD(t *testing.T) {
	f := newFixture(t)
	d := f.attach(f.session(xapitest.RoleVMAdmin))
	release := f.block("VBD.unplug")
	d.Close()
	f.wait("VBD.unplug", f.called("VBD.unplug", 1))
	root := f.session(xapitest.RoleRoot)
	ref := xapi.VBDRef(f.host.VBDs()[0].Ref)
	release()
	// Either of the two may come first.
	_ = root.UnplugVBD(t.Context(), ref)
	_ = root.DestroyVBD(t.Context(), ref)
	f.closeManager()
	f.wantClean()
}

// Without xapi, Close returns in time with an error about the VBDs that are left, and the next
// start removes them.
func TestCloseWithoutXapi(t *testing.T) {
	f := newFixture(t)
	d := f.attach(f.session(xapitest.RoleVMAdmin))
	f.host.Stop()
	d.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := f.manager.Close(ctx); !errors.Is(err, vdi.ErrLeft) {
		t.Errorf("Close: got %v, want ErrLeft", err)
	}
	if f.journal() == "" {
		t.Error("the journal forgot the VBD")
	}
	f.manager.Kill() // waits for the goroutines that Close did not wait for
	do(t, f.host.Resume())
	f.manager = f.open() // as the next process does
	f.recover()
	f.closeManager()
	f.wantClean()
}

func TestOneInstancePerStateFolder(t *testing.T) {
	f := newFixture(t)
	if _, err := vdi.Open(f.cfg); !errors.Is(err, vdi.ErrLocked) {
		t.Errorf("second instance: got %v, want ErrLocked", err)
	}
	f.closeManager()
	f.open()
}

// Lock may be called until it succeeds, and the manager does nothing before that.
func TestLockCanBeTriedAgain(t *testing.T) {
	f := newFixture(t)
	cfg := f.cfg
	m := vdi.New(cfg)
	for range 2 {
		if err := m.Lock(); !errors.Is(err, vdi.ErrLocked) {
			t.Fatalf("beside another instance: got %v, want ErrLocked", err)
		}
	}
	if _, err := m.Attach(t.Context(), f.session(xapitest.RoleVMAdmin), f.vdi); !errors.Is(err, vdi.ErrNotLocked) {
		t.Errorf("Attach: got %v, want ErrNotLocked", err)
	}
	if _, err := m.Journal(); !errors.Is(err, vdi.ErrNotLocked) {
		t.Errorf("Journal: got %v, want ErrNotLocked", err)
	}
	if _, err := m.Recover(t.Context()); !errors.Is(err, vdi.ErrNotLocked) {
		t.Errorf("Recover: got %v, want ErrNotLocked", err)
	}
	if err := vdi.New(cfg).Close(t.Context()); err != nil {
		t.Errorf("Close of one that was never locked: %v", err)
	}
	f.closeManager()
	if err := m.Lock(); err != nil {
		t.Fatalf("after the other one has ended: %v", err)
	}
	if got, err := m.Journal(); err != nil || len(got) != 0 {
		t.Errorf("Journal: got %v, %v", got, err)
	}
	if err := m.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestAttachAfterClose(t *testing.T) {
	f := newFixture(t)
	f.closeManager()
	if _, err := f.manager.Attach(t.Context(), f.session(xapitest.RoleVMAdmin), f.vdi); !errors.Is(err, vdi.ErrClosed) {
		t.Errorf("got %v, want ErrClosed", err)
	}
}
