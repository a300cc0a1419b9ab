package main

import (
	"strings"
	"testing"
	"time"

	"xapi-nbd/nbd"
	"xapi-nbd/xapi/xapitest"
)

// The time left follows the rate of the last half minute, and is not told where
// there is none.
func TestTimeLeft(t *testing.T) {
	const size = 100 << 30
	begin := time.Now()
	var p progress
	conn := func(position int64) nbd.ConnStatus {
		return nbd.ConnStatus{ID: "1", Serving: true, Size: size, Position: position}
	}
	want := func(what string, after time.Duration, position int64, left time.Duration, known bool) {
		t.Helper()
		got, ok := p.left(begin.Add(after), conn(position))
		if ok != known || got.Round(time.Second) != left {
			t.Errorf("%s: got %v, %v, want %v, %v", what, got, ok, left, known)
		}
	}
	sampleAt := func(after time.Duration, position int64) {
		p.note(begin.Add(after), []nbd.ConnStatus{conn(position), {ID: "2"}})
	}
	want("without a sample", 0, 1<<30, 0, false)
	// It comes back where it was when its connection was lost: what lies before counts
	// for nothing.
	sampleAt(0, 40<<30)
	want("no progress yet", time.Second, 40<<30, 0, false)
	want("after a second", time.Second, 41<<30, 59*time.Second, true)
	for i := range 12 { // half of that rate from now on
		sampleAt(time.Duration(i+1)*sampleEvery, 40<<30+int64(i+1)*5<<29)
	}
	want("slower than before", 60*time.Second, 70<<30, 60*time.Second, true)
	want("at the end", 60*time.Second, size, 0, true)
	for i := range keptSamples {
		sampleAt(time.Duration(i+13)*sampleEvery, 70<<30)
	}
	want("stuck for half a minute", 90*time.Second, 70<<30, 0, false)
	want("it moves again, slowly", 90*time.Second, 70<<30+1, maxLeft, true)
	want("it began anew", 91*time.Second, 1<<20, 0, false)
	sampleAt(95*time.Second, 1<<30)
	want("a while after that", 96*time.Second, 2<<30, 98*time.Second, true)
	p.note(begin, nil)
	want("another connection of this ID", 96*time.Second, 2<<30, 0, false)
}

func TestPercentRead(t *testing.T) {
	for _, tt := range []struct {
		position, size int64
		want           int
	}{{0, 1 << 40, 0}, {1<<40 - 512, 1 << 40, 99}, {1 << 40, 1 << 40, 100}, {1 << 39, 1 << 40, 50}, {0, 0, 100}} {
		if got := percentRead(nbd.ConnStatus{Position: tt.position, Size: tt.size}); got != tt.want {
			t.Errorf("%d of %d: got %d, want %d", tt.position, tt.size, got, tt.want)
		}
	}
}

// Sizes, progress and names are in the status, for programs and for people.
func TestStatusTellsProgress(t *testing.T) {
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
		t.Errorf("%d calls for a name that nobody has asked for", n)
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
