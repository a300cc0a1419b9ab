package nbd

import (
	"errors"
	"net"
	"syscall"

	"xapi-nbd/nbd/wire"
)

// HardDisconnectError is the reason why a connection ended in any other way than by
// NBD_CMD_DISC or NBD_OPT_ABORT, section "Terminating the transmission phase". It matches
// [net.ErrClosed].
type HardDisconnectError struct {
	Reason string
	Err    error // may be nil
}

func (e *HardDisconnectError) Error() string {
	if e.Err == nil {
		return e.Reason
	}
	return e.Reason + ": " + e.Err.Error()
}

// Unwrap makes errors.Is find the cause and net.ErrClosed.
func (e *HardDisconnectError) Unwrap() []error { return []error{e.Err, net.ErrClosed} }

func hardDisconnect(reason string, err error) error {
	return &HardDisconnectError{Reason: reason, Err: err}
}

// errnoOf returns the error of the protocol for an error of a device, section "Error
// values". The caller logs the error of the device, which cannot be sent.
func errnoOf(err error) wire.Errno {
	var own wire.Errno
	if errors.As(err, &own) {
		return own
	}
	var sys syscall.Errno
	if !errors.As(err, &sys) {
		return wire.EIO
	}
	switch sys {
	case syscall.EPERM, syscall.EACCES:
		return wire.EPERM
	case syscall.ENOMEM:
		return wire.ENOMEM
	case syscall.EINVAL:
		return wire.EINVAL
	case syscall.ENOSPC:
		return wire.ENOSPC
	case syscall.EOVERFLOW:
		return wire.EOVERFLOW
	case syscall.ENOTSUP:
		return wire.ENOTSUP
	case syscall.ESHUTDOWN:
		return wire.ESHUTDOWN
	}
	return wire.EIO
}

// errnoFor is errnoOf for the reply to a request: section "Error values" allows ENOTSUP only
// for fast zeroing, and EOVERFLOW only for unfragmented reads.
func errnoFor(req wire.Request, err error) wire.Errno {
	errno := errnoOf(err)
	if errno == wire.ENOTSUP && req.Flags&wire.CmdFlagFastZero == 0 ||
		errno == wire.EOVERFLOW && req.Flags&wire.CmdFlagDF == 0 {
		return wire.EINVAL
	}
	return errno
}
