package vdi

import (
	"time"

	"golang.org/x/sys/unix"
)

// bootTime returns the time since the host was booted. It counts the time in which the host
// was suspended, which the monotonic clock of package time does not count on Linux.
func bootTime() time.Duration {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		panic("clock_gettime(CLOCK_BOOTTIME): " + err.Error()) // every Linux since 2.6.39 has it
	}
	return time.Duration(now.Nano())
}
