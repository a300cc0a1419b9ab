//go:build !race

package nbd

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// These make system calls that do not wait, or only as long as they are told,
// without telling the scheduler. The descriptors are non-blocking ones.

// wordSize is that of the machine in bits.
const wordSize = 32 << (^uintptr(0) >> 63)

func readNow(fd int, p []byte) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)))
	return int(n), errno
}

func writevNow(fd int, v []unix.Iovec) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall(unix.SYS_WRITEV, uintptr(fd), uintptr(unsafe.Pointer(&v[0])), uintptr(len(v)))
	return int(n), errno
}

func sendNow(fd int, p []byte, flags int) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)), uintptr(flags), 0, 0)
	return int(n), errno
}

func spliceNow(from, to, n, flags int) (int, syscall.Errno) {
	m, _, errno := syscall.RawSyscall6(unix.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, uintptr(n), uintptr(flags))
	return int(m), errno
}

func preadNow(fd int, v []unix.Iovec, off int64, flags int) (int, syscall.Errno) {
	lo, hi := uintptr(off), uintptr(uint64(off)>>32>>(wordSize-32)) // halves of a word each
	n, _, errno := syscall.RawSyscall6(unix.SYS_PREADV2, uintptr(fd), uintptr(unsafe.Pointer(&v[0])), uintptr(len(v)), lo, hi, uintptr(flags))
	return int(n), errno
}

func ppollNow(fds []unix.PollFd, timeout *unix.Timespec) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&fds[0])), uintptr(len(fds)), uintptr(unsafe.Pointer(timeout)), 0, 0, 0)
	return int(n), errno
}

// yieldNow lets another thread have the processor, if one wants it.
func yieldNow() { _, _, _ = syscall.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0) }
