package vdi_test

import (
	"errors"
	"testing"
	"time"

	"xapi-nbd/vdi"
	"xapi-nbd/xapi/xapitest"
)

var errConnectionLost = errors.New("connection lost")

// lingers makes attachments wait for their clients longer than any test takes.
func lingers(c *vdi.Config) { c.Linger = time.Hour }

// lose ends a connection with an error, as when the client is lost.
func lose(d *vdi.Disk) {
	d.CloseWithError(errConnectionLost)
}

// leave ends a connection as after a disconnect of the client.
func leave(d *vdi.Disk) {
	d.CloseWithError(nil)
}

func (f *fixture) waitStage(want string) {
	f.t.Helper()
	if err := f.manager.WaitStage(f.t.Context(), f.vdi, want); err != nil {
		f.t.Fatal(err)
	}
}

// A client that was lost and comes back finds its VDI plugged.
func TestLingerForALostClient(t *testing.T) {
	f := newFixture(t, lingers)
	lose(f.attach(f.session(xapitest.RoleVMAdmin)))
	f.waitStage("lingering")
	d := f.attach(f.session(xapitest.RoleVMAdmin))
	f.wantContent(d)
	if n := f.count("VBD.create"); n != 1 {
		t.Errorf("VBD.create: got %d calls, want 1", n)
	}
	leave(d)
	f.wait("the VBD to go", noVBDs)
	f.closeManager()
	f.wantClean()
}

func TestLingerEnds(t *testing.T) {
	f := newFixture(t, func(c *vdi.Config) { c.Linger = time.Millisecond })
	lose(f.attach(f.session(xapitest.RoleVMAdmin)))
	f.wait("the VBD to go", noVBDs)
	f.closeManager()
	f.wantClean()
}

// An attachment lingers if its last connection was lost, however the others ended.
func TestLingerDependsOnTheLastConnection(t *testing.T) {
	tests := []struct {
		name        string
		first, last func(*vdi.Disk)
		lingers     bool
	}{
		{"soft", leave, leave, false},
		{"lost, then soft", lose, leave, false},
		{"soft, then lost", leave, lose, true},
		{"never in transmission", leave, func(d *vdi.Disk) { d.Close() }, false},
		{"sent away", leave, func(d *vdi.Disk) { d.Revoke(errors.New("no session")); lose(d) }, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(t, lingers)
			s := f.session(xapitest.RoleVMAdmin)
			first, last := f.attach(s), f.attach(s)
			tt.first(first)
			tt.last(last)
			if tt.lingers {
				f.waitStage("lingering")
			} else {
				f.wait("the VBD to go", noVBDs)
			}
			f.closeManager() // also ends the lingering
			f.wantClean()
		})
	}
}

// VDI.data_destroy waits a short time until VBDs are unplugged.
func TestDataDestroyEndsLingering(t *testing.T) {
	dir := shortDir(t)
	// More than xapi's 4 s, for a busy machine, and less than the lingering.
	host, err := xapitest.Start(xapitest.Config{Dir: dir, Style: xapitest.StyleSM, DataDestroyWait: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	f := newFixtureOn(t, host, dir, lingers)
	lose(f.attach(f.session(xapitest.RoleVMAdmin)))
	f.waitStage("lingering")
	do(t, f.host.DataDestroy(t.Context(), f.vdi))
	f.closeManager()
	f.wantClean()
}

// If all slots are in use, an attachment that lingers is detached for a new VDI.
func TestLingeringFreesItsSlot(t *testing.T) {
	f := newFixture(t, lingers, func(c *vdi.Config) { c.MaxVBDs = 1 })
	other := f.addVDI(xapitest.VDISpec{Size: 1 << 20})
	lose(f.attach(f.session(xapitest.RoleVMAdmin)))
	f.waitStage("lingering")
	d, err := f.manager.Attach(t.Context(), f.session(xapitest.RoleVMAdmin), other)
	if err != nil {
		t.Fatal(err)
	}
	leave(d)
	f.closeManager()
	f.wantClean()
}

// Attach waits for a slot that is becoming free, and fails at once if none is.
func TestAttachWaitsForSlot(t *testing.T) {
	f := newFixture(t, func(c *vdi.Config) { c.MaxVBDs = 1 })
	other := f.addVDI(xapitest.VDISpec{Size: 1 << 20})
	s := f.session(xapitest.RoleVMAdmin)
	first := f.attach(s)
	var full *vdi.LimitError
	if _, err := f.manager.Attach(t.Context(), s, other); !errors.As(err, &full) || full.Max != 1 {
		t.Errorf("got %v, want the limit", err)
	}
	release := f.block("VBD.destroy")
	leave(first)
	f.wait("VBD.destroy", f.called("VBD.destroy", 1))
	attached := make(chan *vdi.Disk)
	go func() {
		d, err := f.manager.Attach(t.Context(), s, other)
		if err != nil {
			t.Error(err)
		}
		attached <- d
	}()
	release()
	leave(<-attached)
	f.closeManager()
	f.wantClean()
}

// A call of Attach that waits takes the first slot that becomes free, not that of the VDI
// that was being detached when the call began.
func TestAttachTakesAnySlot(t *testing.T) {
	f := newFixture(t, func(c *vdi.Config) { c.MaxVBDs = 2 })
	s := f.session(xapitest.RoleVMAdmin)
	stuck := f.attach(s)
	second, err := f.manager.Attach(t.Context(), s, f.addVDI(xapitest.VDISpec{Size: 1 << 20}))
	do(t, err)
	working, release := f.blockWork("unplug")
	leave(stuck)
	<-working
	wanted := f.addVDI(xapitest.VDISpec{Size: 1 << 20})
	attached := make(chan *vdi.Disk)
	go func() {
		d, err := f.manager.Attach(t.Context(), s, wanted)
		if err != nil {
			t.Error(err)
		}
		attached <- d
	}()
	leave(second)
	leave(<-attached) // while the first is stuck still
	release()
	f.closeManager()
	f.wantClean()
}
