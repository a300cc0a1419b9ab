//go:build linux && race

package nbd

import (
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The same calls as in sysnow_linux.go in a form that the race detector sees:
// for it what one end of a connection wrote happens before the other read it.

func readNow(fd int, p []byte) (int, syscall.Errno) {
	n, err := syscall.Read(fd, p)
	return n, sysErrno(err)
}

func writevNow(fd int, v []unix.Iovec) (int, syscall.Errno) {
	n, err := syscall.Write(fd, unsafe.Slice(v[0].Base, v[0].Len))
	return n, sysErrno(err)
}

func sendNow(fd int, p []byte, flags int) (int, syscall.Errno) {
	n, err := unix.SendmsgN(fd, p, nil, nil, flags)
	return n, sysErrno(err)
}

func spliceNow(from, to, n, flags int) (int, syscall.Errno) {
	m, err := unix.Splice(from, nil, to, nil, n, flags)
	return int(m), sysErrno(err)
}

func preadNow(fd int, v []unix.Iovec, off int64, flags int) (int, syscall.Errno) {
	n, err := unix.Preadv2(fd, [][]byte{unsafe.Slice(v[0].Base, v[0].Len)}, off, flags)
	return n, sysErrno(err)
}

func ppollNow(fds []unix.PollFd, timeout *unix.Timespec) (int, syscall.Errno) {
	n, err := unix.Ppoll(fds, timeout, nil)
	return n, sysErrno(err)
}

func yieldNow() { runtime.Gosched() }

func sysErrno(err error) syscall.Errno {
	errno, _ := err.(syscall.Errno)
	return errno
}
