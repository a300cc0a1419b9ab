package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"syscall"

	"xapi-nbd/nbd/wire"
)

// Error is a refusal that a client received: of an option or of a command.
type Error struct {
	Op    string           // the option or command, as the protocol spells it
	Reply wire.OptionReply // for options, otherwise 0
	Errno wire.Errno       // for commands, otherwise 0
	Text  string           // the server's words, untrusted; may be empty
}

func (e *Error) Error() string {
	what := e.Errno.String()
	if e.Reply != 0 {
		what = e.Reply.String()
	}
	if e.Text != "" {
		return fmt.Sprintf("%s: server answered %s: %s", e.Op, what, e.Text)
	}
	return fmt.Sprintf("%s: server answered %s", e.Op, what)
}

// Is matches the errno of a failed command, and what that one matches: the system's
// error of the same name, such as syscall.ENOSPC. Of the refusals of options,
// NBD_REP_ERR_UNSUP matches errors.ErrUnsupported, NBD_REP_ERR_POLICY
// fs.ErrPermission, NBD_REP_ERR_UNKNOWN fs.ErrNotExist and NBD_REP_ERR_SHUTDOWN
// syscall.ESHUTDOWN.
func (e *Error) Is(target error) bool {
	switch e.Reply {
	case 0:
		return e.Errno != wire.Success && errors.Is(e.Errno, target)
	case wire.RepErrUnsup:
		return target == errors.ErrUnsupported
	case wire.RepErrPolicy:
		return target == fs.ErrPermission
	case wire.RepErrUnknown:
		return target == fs.ErrNotExist
	case wire.RepErrShutdown:
		return target == syscall.ESHUTDOWN
	default: // the system has nothing that means the same
		return false
	}
}

// HardDisconnectError says why a connection was closed without the courtesies
// of the protocol, section "Terminating the transmission phase". It matches
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

// errnoOf is the only place where an error of a device becomes an error of
// the protocol, section "Error values". The caller logs the true error: the
// wire cannot carry it.
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

// errnoFor is errnoOf for the answer to a request: section "Error values" knows
// ENOTSUP for fast zeroing only, and EOVERFLOW for unfragmented reads.
func errnoFor(req wire.Request, err error) wire.Errno {
	errno := errnoOf(err)
	if errno == wire.ENOTSUP && req.Flags&wire.CmdFlagFastZero == 0 ||
		errno == wire.EOVERFLOW && req.Flags&wire.CmdFlagDF == 0 {
		return wire.EINVAL
	}
	return errno
}

// isTimeout reports whether a deadline ended a read or a write.
func isTimeout(err error) bool {
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded)
}

// isGone reports whether the peer closed or lost the connection, as opposed to
// having broken the protocol.
func isGone(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.ErrClosedPipe) ||
		errors.Is(err, net.ErrClosed) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) ||
		errors.Is(err, syscall.ETIMEDOUT)
}
