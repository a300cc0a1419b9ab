package main

import (
	"strings"
	"testing"

	"xapi-nbd/xapi/xapitest"
)

// TestStatusShowsProgress: sizes, progress and names are in the status, as JSON and as text.
func TestStatusShowsProgress(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{NameLabel: "web1 \u202eroot", VMName: "web1"})
	p := w.start()
	conn, err := w.open(p, w.export(vdi), false)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.ReadAt(make([]byte, 256<<10), 512<<10); err != nil {
		t.Fatal(err)
	}
	if n := w.count("VBD.get_VM") + w.count("VM.get_name_label"); n != 0 {
		t.Errorf("%d calls for a name before the first status", n)
	}
	w.waitScreen("\n"+vdi+"    1.0 MiB attached ", `"web1 \u202eroot" of VM "web1"`, " 75%      - ")
	r := w.report()
	if a := r.Attachments[0]; a.Size != 1<<20 || a.VMName != "web1" || !strings.HasPrefix(a.VDIName, "web1") {
		t.Errorf("attachment: got %+v", a)
	}
	if c := served(t, r); c.Size != 1<<20 || c.Position != 768<<10 || c.Percent != 75 || c.SecondsLeft != nil {
		t.Errorf("connection: got %+v", c)
	}
	if _, err := conn.ReadAt(make([]byte, 256<<10), 768<<10); err != nil {
		t.Fatal(err)
	}
	w.waitScreen("100%     0s ")
	if got := served(t, w.report()).SecondsLeft; got == nil || *got != 0 {
		t.Errorf("seconds left at the end: got %v, want 0", got)
	}
	if n := w.count("VM.get_name_label"); n != 1 {
		t.Errorf("the name of the VM was asked for %d times, want once", n)
	}
}
