// Package crash decides how the programs end when they crash.
package crash

import (
	"runtime/debug"

	"golang.org/x/sys/unix"
)

// BySignal makes a panic, a fatal error of the Go runtime, and a signal such as
// SIGABRT or SIGQUIT end the process by SIGABRT, after the goroutines have been
// printed. By default they end it with exit status 2, which is also that of a
// usage error: systemd would not start the service again.
//
// There is no core dump all the same: the memory holds sessions of xapi, and not
// every handler of core dumps heeds RLIMIT_CORE.
func BySignal() {
	debug.SetTraceback("crash")
	// Fails only for a value that the kernel does not know.
	_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
}
