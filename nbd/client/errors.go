package client

import (
	"errors"
	"fmt"
	"io/fs"
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

// OffsetError is a failure of which the server said where in the export it
// happened.
type OffsetError struct {
	Offset int64 // bytes from the beginning of the export
	Err    error // the [*Error]
}

func (e *OffsetError) Error() string { return fmt.Sprintf("%v (at offset %d)", e.Err, e.Offset) }

// Unwrap returns the failure itself.
func (e *OffsetError) Unwrap() error { return e.Err }

// ErrUnsupported is matched by the errors of calls that the server, or this export
// of it, does not offer. Nothing was sent. It matches errors.ErrUnsupported.
var ErrUnsupported error = unsupportedError{}

type unsupportedError struct{}

func (unsupportedError) Error() string { return "not supported by the server" }

func (unsupportedError) Is(target error) bool { return target == errors.ErrUnsupported }

// errLocal matches errors of what the caller asked for; nothing was sent.
var errLocal = errors.New("nbd: invalid argument")

func checkString(what, s string) error {
	if len(s) > wire.MaxString {
		return fmt.Errorf("%w: %s of %d bytes, at most %d allowed", errLocal, what, len(s), wire.MaxString)
	}
	return nil
}

func errNotFixed(opt wire.Option) error {
	return fmt.Errorf("%v: %w, which does not speak fixed newstyle", opt, ErrUnsupported)
}
