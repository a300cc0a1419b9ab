package xapi

import (
	"strconv"
	"testing"
	"testing/synctest"
	"time"
)

// TestUnreadableLog logs each object once a minute, and needs bounded memory.
func TestUnreadableLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l unreadableLog
		wantLog := func(when, class, ref string, want bool) {
			t.Helper()
			if got := l.mayLog(class, ref); got != want {
				t.Errorf("%s: got %t for %s %s, want %t", when, got, class, ref, want)
			}
		}
		wantLog("first time", "VDI", "1", true)
		wantLog("at once", "VDI", "1", false)
		wantLog("other object", "VDI", "2", true)
		wantLog("other class", "VBD", "1", true)
		time.Sleep(unreadablePause - time.Nanosecond)
		wantLog("before the pause is over", "VDI", "1", false)
		time.Sleep(time.Nanosecond)
		wantLog("after the pause", "VDI", "1", true)
		wantLog("after that", "VDI", "1", false)
		for i := range 10 * maxUnreadable {
			l.mayLog("VBD", strconv.Itoa(i))
		}
		if n := len(l.last); n > maxUnreadable {
			t.Errorf("%d objects are stored, want at most %d", n, maxUnreadable)
		}
	})
}
