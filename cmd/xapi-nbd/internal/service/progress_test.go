package service

import (
	"testing"
	"time"

	"xapi-nbd/nbd"
)

// TestTimeLeft: the time left follows from the rate of the last half minute; without a rate
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
	// After a reconnect it goes on at its old position: the range before does not count for
	// the rate.
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
