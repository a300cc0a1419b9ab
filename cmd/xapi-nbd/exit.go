package main

import (
	"errors"

	"xapi-nbd/cmd/xapi-nbd/internal/service"
	"xapi-nbd/vdi"
)

// The exit codes, which units and scripts rely on. A crash ends by a signal.
const (
	exitFailed      = 1 // check found problems; no service is running, or it refused the request
	exitUsage       = 2 // usage or configuration: an administrator has to correct it
	exitBind        = 3 // an address that can never be listened on
	exitUnreachable = 4 // xapi unreachable within startup_wait
	exitLeft        = 5 // stopped in time, VBDs left in the journal
	exitNotUpgraded = 6 // upgrade: the new process did not get ready; the old one goes on
)

// exitCode is the only place where errors become exit codes. If the error that ended the
// service is joined with vdi.ErrLeft, it decides.
func exitCode(err error) int {
	var exit *exitError
	switch {
	case errors.As(err, &exit):
		return exit.code
	case errors.Is(err, service.ErrStateFolder):
		return exitUsage
	case errors.Is(err, service.ErrListen):
		return exitBind
	case errors.Is(err, service.ErrXapiUnreachable):
		return exitUnreachable
	case errors.Is(err, vdi.ErrLeft):
		return exitLeft
	}
	return exitUsage
}

// exitError is an error of a command that decides the exit code itself.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }
