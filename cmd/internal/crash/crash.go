// Package crash sets how the programs exit when they crash.
package crash

import (
	"runtime/debug"

	"golang.org/x/sys/unix"
)

// BySignal makes a panic, a fatal error of the Go runtime, and a signal such as SIGQUIT end
// the process by SIGABRT, after the stacks of all goroutines have been printed. By default
// they end it with exit status 2, the status of a usage error, with which systemd does not
// restart the service.
//
// It disables core dumps, because the memory contains sessions of xapi, and some handlers
// of core dumps ignore RLIMIT_CORE.
func BySignal() {
	debug.SetTraceback("crash")
	// Fails only for a value that the kernel does not know.
	_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
}
