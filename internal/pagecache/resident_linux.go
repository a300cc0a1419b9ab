package pagecache

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Resident reports whether the byte at off is in the page cache, without reading anything
// in. preadv2(2) with RWF_NOWAIT would start reading ahead on newer kernels and then find its
// own pages. For a caller that neither owns the file nor may write to it the result is
// always true (mincore(2)). off must be within the file.
func Resident(fd int, off int64) (bool, error) {
	page := int64(os.Getpagesize())
	m, err := unix.Mmap(fd, off&^(page-1), int(page), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return false, os.NewSyscallError("mmap", err)
	}
	defer func() { _ = unix.Munmap(m) }() // cannot fail for a result of Mmap
	var vec [1]byte
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m[0])), uintptr(page), uintptr(unsafe.Pointer(&vec[0])))
	if errno != 0 {
		return false, os.NewSyscallError("mincore", errno)
	}
	return vec[0]&1 != 0, nil
}
