package vdi

import (
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// bootTime is the clock of /proc/uptime, which counts the time in which the host was suspended.
func TestBootTime(t *testing.T) {
	uptime := func() time.Duration {
		text, err := os.ReadFile("/proc/uptime")
		must(t, err)
		seconds, err := strconv.ParseFloat(strings.Fields(string(text))[0], 64)
		must(t, err)
		return time.Duration(seconds * float64(time.Second))
	}
	const unit = 10 * time.Millisecond // of /proc/uptime
	before, got, after := uptime(), bootTime(), uptime()
	if got < before-unit || got > after+unit {
		t.Errorf("got %v, want it from %v to %v", got, before, after)
	}
}
