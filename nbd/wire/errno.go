package wire

import "syscall"

// Errno is an error number of the transmission phase, section "Error values".
// The protocol defines the numbers; that they are those of Linux does not matter.
type Errno uint32

// The error values; a server sends no others.
const (
	Success   Errno = 0
	EPERM     Errno = 1
	EIO       Errno = 5
	ENOMEM    Errno = 12
	EINVAL    Errno = 22
	ENOSPC    Errno = 28
	EOVERFLOW Errno = 75
	ENOTSUP   Errno = 95
	ESHUTDOWN Errno = 108
)

// Known returns e, or EINVAL for a number that the protocol does not define: a client must
// treat it as EINVAL.
func (e Errno) Known() Errno {
	if _, ok := errnoNames[e]; ok {
		return e
	}
	return EINVAL
}

// Error makes an Errno usable as an error value.
func (e Errno) Error() string { return e.String() }

// systemErrnos are the system's numbers for those of the protocol.
var systemErrnos = map[Errno]syscall.Errno{
	EPERM: syscall.EPERM, EIO: syscall.EIO, ENOMEM: syscall.ENOMEM, EINVAL: syscall.EINVAL,
	ENOSPC: syscall.ENOSPC, EOVERFLOW: syscall.EOVERFLOW, ENOTSUP: syscall.ENOTSUP, ESHUTDOWN: syscall.ESHUTDOWN,
}

// Is reports whether target is the system's error of the same name, or an error that this
// one matches: EPERM is an fs.ErrPermission, ENOTSUP an errors.ErrUnsupported.
func (e Errno) Is(target error) bool {
	system, ok := systemErrnos[e]
	return ok && (target == system || system.Is(target))
}
