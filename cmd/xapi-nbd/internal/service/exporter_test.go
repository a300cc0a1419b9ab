package service

import (
	"testing"
)

// Both ways to close a disk end the watch of its session and give its share of the rate
// limit back.
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
