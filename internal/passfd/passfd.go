// Package passfd makes descriptors that can be passed to another process.
package passfd

import (
	"errors"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Dup returns another descriptor of an open file or socket, which the caller closes. It does
// not change the mode of the open file, which both share: the File methods of package net
// let a listener block, also in this process, as soon as the descriptor is used.
func Dup(c syscall.Conn) (*os.File, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var dup int
	var derr error
	err = raw.Control(func(fd uintptr) { dup, derr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3) })
	if err := errors.Join(err, os.NewSyscallError("fcntl F_DUPFD_CLOEXEC", derr)); err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(dup), "passed"), nil
}
