package pagecache

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// mincore asks about one page.
func mincore(page []byte, vec *byte) error {
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&page[0])), uintptr(len(page)), uintptr(unsafe.Pointer(vec)))
	if errno != 0 {
		return errno
	}
	return nil
}
