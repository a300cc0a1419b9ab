package service

import (
	"testing"
)

// TestWatchedDiskStops: Close and CloseWithError both end the watch of the session and release
// the rate limit.
func TestWatchedDiskStops(t *testing.T) {
	for name, closeDisk := range map[string]func(*watchedDisk) error{
		"Close":          (*watchedDisk).Close,
		"CloseWithError": func(d *watchedDisk) error { return d.CloseWithError(nil) },
	} {
		t.Run(name, func(t *testing.T) {
			rates := newRates(0, 0)
			pace, leave := rates.join("vdi")
			watched := true
			d := &watchedDisk{pace: pace, stopPacing: leave, stopWatching: func() { watched = false }}
			func() {
				defer func() { _ = recover() }() // there is no disk behind it
				_ = closeDisk(d)
			}()
			if watched || len(rates.vdis) != 0 {
				t.Errorf("session still watched: %t, rates still joined: %d", watched, len(rates.vdis))
			}
		})
	}
}
