package vdi_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/internal/fsys/memfs"
	"xapi-nbd/vdi"
	"xapi-nbd/xapi/xapitest"
)

// leaveTagged makes a plugged VBD of a VDI of its own, as a process that was killed
// leaves it.
func (f *fixture) leaveTagged() (vbd string) {
	f.t.Helper()
	disk := f.addVDI(xapitest.VDISpec{Image: f.host.ImagePath(f.vdi)})
	vbd, err := f.host.AddForeignVBD(disk, map[string]string{"xapi-nbd": f.host.InstallationUUID() + " nonce" + disk + " 1.dead"})
	do(f.t, err)
	do(f.t, f.host.PlugForeign(vbd))
	return vbd
}

// xapi hangs while it unplugs one of three VBDs: the others are removed at once, and the
// hung one is listed.
func TestHungUnplugDelaysNoOther(t *testing.T) {
	f := newFixture(t)
	for range 3 {
		f.leaveTagged()
	}
	hangs, release := f.blockWork("unplug")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	type outcome struct {
		got vdi.Recovered
		err error
	}
	recovered := make(chan outcome)
	go func() {
		got, err := f.manager.Recover(ctx)
		recovered <- outcome{got, err}
	}()
	<-hangs
	f.wait("the other two to go", func(vbds []xapitest.VBD) bool { return len(vbds) == 1 })
	hung := f.host.VBDs()[0].UUID
	f.waitLeftovers(1)
	cancel() // Recover would wait for half a minute
	o := <-recovered
	if o.err == nil || len(o.got.Removed) != 2 || len(o.got.Left) != 1 || o.got.Left[0].VBD != hung {
		t.Errorf("recovery: got %+v, %v, want two removed and %s left", o.got, o.err, hung)
	}
	if l := f.manager.Leftovers()[0]; l.VBD != hung || l.Attempts != 0 || !l.NextAttempt.IsZero() || l.Since.IsZero() {
		t.Errorf("during the attempt: got %+v", l)
	}

	// Recover does not wait for xapi either.
	f.host.DropConnections()
	got, err := f.manager.Recover(t.Context())
	if err == nil || len(got.Left) != 1 || got.Left[0].LastError == "" || got.Left[0].Attempts == 0 {
		t.Errorf("while xapi is busy with it: got %+v, %v, want it left with the reason", got, err)
	}
	if n := f.count("VBD.unplug"); n != 3 {
		t.Errorf("VBD.unplug: got %d calls, want one for each VBD", n)
	}
	release()
	f.wait("the last one to go", noVBDs)
	f.closeManager()
	f.wantClean()
}

// The pauses between attempts grow, and Wake ends them: then a leftover is tried at
// once, and the pauses begin anew.
func TestWakeEndsThePauses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		files := vdi.NewMemFS()
		m, err := vdi.OpenFS(vdi.Config{StateDir: memStateDir, Inventory: "/nonexistent"}, files)
		do(t, err)
		defer m.Kill()
		m.AddGoneLeftover("11111111-2222-3333-4444-555555555555") // its entry has to be removed
		files.OnOp(func(memfs.Op) error { return syscall.EIO })
		wantPauses := func(pauses ...time.Duration) {
			t.Helper()
			for _, want := range pauses {
				synctest.Wait()
				l := m.Leftovers()[0]
				if got := time.Until(l.NextAttempt); got != want {
					t.Fatalf("after attempt %d: got a pause of %v, want %v", l.Attempts, got, want)
				}
				attempts := l.Attempts
				time.Sleep(want)
				synctest.Wait()
				if l := m.Leftovers()[0]; l.Attempts != attempts+1 {
					t.Fatalf("after the pause: got %d attempts, want %d", l.Attempts, attempts+1)
				}
			}
		}
		grown := func() (pauses []time.Duration) {
			for pause := 100 * time.Millisecond; pause < 5*time.Minute; pause *= 2 {
				pauses = append(pauses, pause)
			}
			return append(pauses, 5*time.Minute, 5*time.Minute)
		}()
		wantPauses(grown...)
		before := m.Leftovers()[0].Attempts
		m.Wake()
		synctest.Wait()
		if got := m.Leftovers()[0].Attempts; got != before+1 {
			t.Errorf("after Wake: got %d attempts, want %d", got, before+1)
		}
		wantPauses(grown...)
		files.OnOp(nil)
		m.Wake()
		synctest.Wait()
		if left := m.Leftovers(); len(left) != 0 {
			t.Errorf("got %+v, want nothing left", left)
		}
	})
}

// xapi refuses to unplug the old VBD of a VDI: a new one is plugged, but not
// without limit.
func TestAttachBesideARefusedUnplug(t *testing.T) {
	f := newFixture(t)
	f.host.FailAlways("VBD.unplug", "INTERNAL_ERROR", "no")
	s := f.session(xapitest.RoleVMAdmin)
	for n := 1; n <= 2; n++ {
		d := f.attach(s)
		f.wantContent(d)
		leave(d)
		f.waitLeftovers(n)
	}
	ctx, cancel := context.WithTimeoutCause(t.Context(), 300*time.Millisecond, vdi.ErrStillAttaching)
	defer cancel()
	_, err := f.manager.Attach(ctx, s, f.vdi)
	wantDetaching(t, err)
	if got := len(f.host.VBDs()); got != 2 {
		t.Errorf("VBDs: got %d, want 2", got)
	}
	f.host.ClearFaults()
	f.closeManager()
	f.wantClean()
}

// While xapi unplugs the old VBD of a VDI, the error of a new client says so, and not that
// its attach was slow.
func TestAttachDuringAHungUnplug(t *testing.T) {
	f := newFixture(t, func(cfg *vdi.Config) { cfg.AttachTimeout = 100 * time.Millisecond })
	d := f.attachSlowly()
	hangs, release := f.blockWork("unplug")
	leave(d)
	<-hangs
	_, err := f.manager.Attach(t.Context(), f.session(xapitest.RoleVMAdmin), f.vdi)
	wantDetaching(t, err)

	// The same if the response was lost, and only xapi's records show the operation.
	f.host.DropConnections()
	f.waitLeftovers(1)
	_, err = f.manager.Attach(t.Context(), f.session(xapitest.RoleVMAdmin), f.vdi)
	wantDetaching(t, err)
	if n := f.count("VBD.create"); n != 1 {
		t.Errorf("VBD.create: got %d calls, want 1", n)
	}
	release()
	f.wait("the VBD to go", noVBDs)
	f.closeManager()
	f.wantClean()
}

// attachSlowly is attach for tests that have set a short timeout: it raises it.
func (f *fixture) attachSlowly() *vdi.Disk {
	f.t.Helper()
	short := vdi.Limits{AttachTimeout: f.cfg.AttachTimeout}
	f.manager.SetLimits(vdi.Limits{AttachTimeout: time.Minute})
	defer f.manager.SetLimits(short)
	return f.attach(f.session(xapitest.RoleVMAdmin))
}

func wantDetaching(t *testing.T, err error) {
	t.Helper()
	var detaching *vdi.DetachingError
	if !errors.As(err, &detaching) {
		t.Fatalf("got %v, want a DetachingError", err)
	}
	if age := time.Since(detaching.Since); age < 0 || age > time.Minute {
		t.Errorf("since %v, which is %v ago", detaching.Since, age)
	}
}

// A second manager of the host with another state folder does nothing until the first one
// is closed.
func TestOneInstancePerHost(t *testing.T) {
	f := newFixture(t)
	d := f.attach(f.session(xapitest.RoleVMAdmin))
	cfg := f.cfg
	cfg.StateDir += "2"
	second := vdi.New(cfg)
	var locked *vdi.LockedError
	if err := second.Lock(); !errors.As(err, &locked) {
		t.Fatalf("second instance: got %v, want a LockedError", err)
	}
	if locked.StateDir != f.stateDir || locked.PID != os.Getpid() || locked.Installation != f.host.InstallationUUID() {
		t.Errorf("got %+v", locked)
	}
	if _, err := second.Recover(t.Context()); !errors.Is(err, vdi.ErrNotLocked) {
		t.Errorf("Recover: got %v, want ErrNotLocked", err)
	}
	f.wantContent(d)
	leave(d)
	f.closeManager()
	f.wantClean()
	if err := second.Lock(); err != nil {
		t.Errorf("after the first one has ended: %v", err)
	}
	do(t, second.Close(t.Context()))
}

// If the inventory could not be read at the start, the host is locked before the first
// operation.
func TestHostIsLockedLate(t *testing.T) {
	f := newFixture(t)
	d := f.attach(f.session(xapitest.RoleVMAdmin))
	cfg := f.cfg
	cfg.StateDir += "2"
	cfg.Inventory += "2"
	second, err := vdi.Open(cfg)
	do(t, err)
	inventory, err := os.ReadFile(f.cfg.Inventory)
	do(t, err)
	do(t, os.WriteFile(cfg.Inventory, inventory, 0o600))
	if _, err := second.Recover(t.Context()); !errors.Is(err, vdi.ErrLocked) {
		t.Errorf("Recover: got %v, want ErrLocked", err)
	}
	if _, err := second.Attach(t.Context(), f.session(xapitest.RoleVMAdmin), f.vdi); !errors.Is(err, vdi.ErrLocked) {
		t.Errorf("Attach: got %v, want ErrLocked", err)
	}
	do(t, second.Close(t.Context()))
	f.wantContent(d)
	leave(d)
	f.closeManager()
	f.wantClean()
}

// Recover ignores lines of the journal that name VBDs of another host or VM. It removes a VBD
// of an earlier process, also with an old form of the tag.
func TestRecoverOfOthersEntries(t *testing.T) {
	f := newFixture(t)
	const otherHost = "11111111-2222-3333-4444-555555555555"
	theirs, err := f.host.AddForeignVBD(f.vdi, map[string]string{"xapi-nbd": otherHost + " nonce"})
	do(t, err)
	do(t, f.host.PlugForeign(theirs))
	ours := []string{f.leaveTagged(), f.leaveTagged()}
	do(t, f.host.AddToOtherConfig(ours[0], "xapi-nbd", f.host.InstallationUUID()+" old")) // without an owner
	slices.Sort(ours)
	f.writeJournal(theirs + "\n")
	got, err := f.manager.Recover(t.Context())
	do(t, err)
	slices.Sort(got.Removed)
	if !slices.Equal(got.Removed, ours) || len(got.Left) != 0 {
		t.Errorf("got %+v, want %q removed", got, ours)
	}
	if left := f.host.VBDs(); len(left) != 1 || left[0].UUID != theirs || !left[0].CurrentlyAttached {
		t.Errorf("VBDs: got %+v, want the other host's as it was", left)
	}
	if got := f.journal(); got != theirs+"\n" {
		t.Errorf("journal: got %q, want the other host's VBD", got)
	}
	f.closeManager() // does not count it as left
}

// If a line of the journal names a VBD of another VM or host, no call changes that VBD, and
// the line stays.
func TestJournalLinesOfOthersAreNotActedOn(t *testing.T) {
	for _, tt := range othersVBDs {
		for _, plugged := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, plugged: %t", tt.name, plugged), func(t *testing.T) {
				f := newFixture(t)
				theirs := f.addOthersVBD(tt.tag, tt.otherVM, plugged)
				f.writeJournal(theirs + "\n")
				for range 2 {
					f.recover()
				}
				f.wantUntouched(theirs, plugged)
				f.closeManager() // does not count it as left
				f.manager = f.open()
				f.recover()
				f.wantUntouched(theirs, plugged)
			})
		}
	}
}

// othersVBDs are VBDs of other hosts or VMs. In tags HOST is replaced by this host's uuid.
var othersVBDs = []struct {
	name, tag string
	otherVM   bool
}{
	{"another host's tag", "11111111-2222-3333-4444-555555555555 nonce 1.owner", false},
	{"a guest's", "", true},
	{"another host's", "11111111-2222-3333-4444-555555555555 nonce 1.owner", true},
	{"a guest's with this host's tag", "HOST nonce 1.owner", true},
}

func (f *fixture) addOthersVBD(tag string, otherVM, plugged bool) (vbd string) {
	f.t.Helper()
	var otherConfig map[string]string
	if tag != "" {
		otherConfig = map[string]string{"xapi-nbd": strings.Replace(tag, "HOST", f.host.InstallationUUID(), 1)}
	}
	vbd, err := f.host.AddForeignVBD(f.vdi, otherConfig)
	do(f.t, err)
	if plugged {
		do(f.t, f.host.PlugForeign(vbd))
	}
	if otherVM {
		do(f.t, f.host.MoveToOtherVM(vbd))
	}
	return vbd
}

// wantUntouched requires that no call has tried to change a VBD, and that the journal still
// names it.
func (f *fixture) wantUntouched(vbd string, plugged bool) {
	f.t.Helper()
	if unplugs, destroys := f.count("VBD.unplug"), f.count("VBD.destroy"); unplugs+destroys != 0 {
		f.t.Errorf("got %d calls of VBD.unplug and %d of VBD.destroy, want none", unplugs, destroys)
	}
	if left := f.host.VBDs(); len(left) != 1 || left[0].UUID != vbd || left[0].CurrentlyAttached != plugged {
		f.t.Errorf("VBDs: got %+v, want %s as it was", left, vbd)
	}
	if got := f.journal(); got != vbd+"\n" {
		f.t.Errorf("journal: got %q, want %s", got, vbd)
	}
}

// Between an unplug that failed and the next attempt the device was bound to another disk.
// The VBD is not unplugged then, because xapi disconnects by the name of the device.
func TestReboundDeviceIsNotUnplugged(t *testing.T) {
	tests := []struct {
		name string
		left func(f *fixture) // leaves the VBD
	}{
		{"by this process", func(f *fixture) { leave(f.attach(f.session(xapitest.RoleVMAdmin))) }},
		{"by an earlier process", func(f *fixture) {
			f.leaveTagged()
			_, _ = f.manager.Recover(f.t.Context())
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := shortDir(t)
			host, err := xapitest.Start(xapitest.Config{Dir: dir, Style: xapitest.StyleNBD})
			do(t, err)
			f := newFixtureOn(t, host, dir)
			f.host.FailAlways("VBD.unplug", "INTERNAL_ERROR", "no")
			tt.left(f)
			f.waitLeftovers(1)
			device := f.host.VBDs()[0].Device
			record := filepath.Join(f.host.NBDDir(), strings.TrimPrefix(device, "nbd"))
			do(t, os.WriteFile(record+".new", []byte(`{"path":"/run/nbd/sr/11111111-2222-3333-4444-555555555555"}`), 0o600))
			do(t, os.Rename(record+".new", record))
			before := f.settledUnplugs()
			f.host.ClearFaults()
			got, err := f.manager.Recover(t.Context())
			if err == nil || len(got.Left) != 1 || !strings.Contains(got.Left[0].LastError, "bound anew") {
				t.Errorf("got %+v, %v, want the VBD left because of its device", got, err)
			}
			if n := f.count("VBD.unplug"); n != before {
				t.Errorf("VBD.unplug: got %d calls after the device was bound anew", n-before)
			}
			// When the other VBD is gone the unplug is safe.
			do(t, os.Remove(record))
			f.recover()
			f.closeManager()
			f.wantClean()
		})
	}
}

// settledUnplugs makes an attempt, waits for its end, and returns the number of calls of
// VBD.unplug.
func (f *fixture) settledUnplugs() int {
	f.t.Helper()
	if _, err := f.manager.Recover(f.t.Context()); err == nil {
		f.t.Error("the VBD was removed")
	}
	return f.count("VBD.unplug")
}
