package client

import (
	"errors"
	"fmt"
	"io/fs"
	"syscall"

	"xapi-nbd/nbd/wire"
)

// Error is the refusal of an option, or the failure of a command, by the server. [errors.Is]
// compares it with errnos of the protocol and with errors of the system: see [Error.Is] and
// [Error.Unwrap].
type Error struct {
	Op    string           // the name of the option or command, such as NBD_CMD_READ
	Reply wire.OptionReply // the refusal of an option; 0 for a command
	Errno wire.Errno       // the error of a command; 0 for an option
	Text  string           // the server's explanation, untrusted; may be empty
}

func (e *Error) Error() string {
	code := e.Errno.String()
	if e.Reply != 0 {
		code = e.Reply.String()
	}
	if e.Text != "" {
		return fmt.Sprintf("%s: server answered %s: %s", e.Op, code, e.Text)
	}
	return fmt.Sprintf("%s: server answered %s", e.Op, code)
}

// Unwrap returns the errno of a failed command, so that e matches it, such as
// [wire.ENOSPC], and the system's error of the same name, such as syscall.ENOSPC.
func (e *Error) Unwrap() error {
	if e.Reply != 0 || e.Errno == wire.Success {
		return nil
	}
	return e.Errno
}

// Is reports whether target means the same as the refusal of an option:
// NBD_REP_ERR_UNSUP matches [errors.ErrUnsupported], NBD_REP_ERR_POLICY
// [fs.ErrPermission], NBD_REP_ERR_UNKNOWN [fs.ErrNotExist] and NBD_REP_ERR_SHUTDOWN
// syscall.ESHUTDOWN.
func (e *Error) Is(target error) bool {
	switch e.Reply {
	case wire.RepErrUnsup:
		return target == errors.ErrUnsupported
	case wire.RepErrPolicy:
		return target == fs.ErrPermission
	case wire.RepErrUnknown:
		return target == fs.ErrNotExist
	case wire.RepErrShutdown:
		return target == syscall.ESHUTDOWN
	default: // a failed command, or a refusal for which the system has no error that means the same
		return false
	}
}

// OffsetError is the failure of a command at an offset that the server named.
type OffsetError struct {
	Offset int64 // bytes from the beginning of the export
	Err    error // the [*Error]
}

func (e *OffsetError) Error() string { return fmt.Sprintf("%v (at offset %d)", e.Err, e.Offset) }

// Unwrap returns Err.
func (e *OffsetError) Unwrap() error { return e.Err }

// ErrUnsupported is matched by the error of a call that the server does not offer, in
// general or for this export. Nothing was sent for it. ErrUnsupported itself matches
// [errors.ErrUnsupported].
var ErrUnsupported error = unsupportedError{}

type unsupportedError struct{}

func (unsupportedError) Error() string { return "not supported by the server" }

func (unsupportedError) Is(target error) bool { return target == errors.ErrUnsupported }

// errArgument is matched by the errors of invalid arguments. Nothing was sent.
var errArgument = errors.New("nbd: invalid argument")

func checkString(name, s string) error {
	if len(s) > wire.MaxString {
		return fmt.Errorf("%w: %s of %d bytes, at most %d allowed", errArgument, name, len(s), wire.MaxString)
	}
	return nil
}

func errNotFixed(opt wire.Option) error {
	return fmt.Errorf("%v: %w, which does not speak fixed newstyle", opt, ErrUnsupported)
}
