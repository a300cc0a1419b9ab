package vdi_test

import (
	"errors"
	"strings"
	"testing"

	"xapi-nbd/vdi"
	"xapi-nbd/xapi/xapitest"
)

// Status follows the stages of an attachment.
func TestStatus(t *testing.T) {
	f := newFixture(t)
	if got := f.manager.Status(); len(got) != 0 {
		t.Errorf("at first: got %+v", got)
	}
	release := f.block("VBD.plug")
	defer release()
	attached := make(chan *vdi.Disk, 1)
	s := f.session(xapitest.RoleVMAdmin)
	go func() {
		d, err := f.manager.Attach(t.Context(), s, f.vdi)
		if err != nil {
			t.Error(err)
		}
		attached <- d
	}()
	f.wait("the plug", f.called("VBD.plug", 1))
	got := f.manager.Status()
	if len(got) != 1 || got[0].Stage != "plugging" || got[0].VDI != f.vdi || got[0].Users != 1 {
		t.Errorf("during the plug: got %+v", got)
	}
	release()
	d := <-attached
	second := f.attach(f.session(xapitest.RoleVMAdmin))
	got = f.manager.Status()
	if len(got) != 1 || got[0].Stage != "attached" || got[0].Users != 2 || got[0].VBD != f.host.VBDs()[0].UUID || got[0].Since.IsZero() {
		t.Errorf("with two users: got %+v", got)
	}
	journal, err := f.manager.Journal()
	if err != nil || len(journal) != 1 || journal[0] != got[0].VBD {
		t.Errorf("journal: got %q, %v, want %s", journal, err, got[0].VBD)
	}
	d.Close()
	second.Close()
	f.closeManager()
	f.wantClean()
	if got := f.manager.Status(); len(got) != 0 {
		t.Errorf("in the end: got %+v", got)
	}
}

// A higher limit is effective at once, and a lower one detaches no VDI.
func TestSetLimits(t *testing.T) {
	f := newFixture(t, func(c *vdi.Config) { c.MaxVBDs = 1 })
	first := f.attach(f.session(xapitest.RoleVMAdmin))
	defer first.Close() // the manager is closed after it
	f.manager.SetLimits(vdi.Limits{MaxVBDs: 2})
	mine := f.vdi
	f.vdi = f.addVDI(xapitest.VDISpec{Size: 1 << 20})
	second := f.attach(f.session(xapitest.RoleVMAdmin))
	defer second.Close()
	f.manager.SetLimits(vdi.Limits{MaxVBDs: 1})
	third := f.addVDI(xapitest.VDISpec{Size: 1 << 20})
	_, err := f.manager.Attach(t.Context(), f.session(xapitest.RoleVMAdmin), third)
	var limit *vdi.LimitError
	if !errors.As(err, &limit) || !strings.Contains(err.Error(), "max_vbds is 1") {
		t.Errorf("above the limit: got %v", err)
	}
	if got := f.manager.Status(); len(got) != 2 || got[0].VDI != mine {
		t.Errorf("got %+v, want both that were there", got)
	}
	f.wantContent(first)
	first.Close()
	second.Close()
	f.closeManager()
	f.wantClean()
}
