package blockdev

import (
	"errors"
	"io"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Direct reads (O_DIRECT) need aligned memory, aligned offsets and whole units: the sectors
// of a block device. A page is a multiple of every sector size. It is also used for files,
// because the unit of their file system is not known.
const (
	directUnit = 4096
	// directBounce is the size of one read or write for a caller whose memory or range is not
	// aligned.
	directBounce = 256 << 10
)

// openDirect opens a device, with further flags, for direct reads and writes. It returns nil
// without an error if the file system does not support them.
func openDirect(path string, flags int) (file *os.File, err error) {
	f, err := os.OpenFile(path, flags|unix.O_DIRECT, 0)
	if errors.Is(err, unix.EINVAL) {
		return nil, nil
	}
	return f, err
}

// directBuffers are the buffers for reads and writes that are not aligned.
var directBuffers = sync.Pool{New: func() any {
	b := make([]byte, directBounce+directUnit)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & (directUnit - 1)
	b = b[skip : skip+directBounce]
	return &b
}}

// readDirect is ReadAt for a device that was opened for direct reads. The range need not be
// aligned.
func (d *Device) readDirect(p []byte, off int64) (int, error) {
	n := 0
	for n < len(p) {
		m, err := d.readSome(p[n:], off+int64(n))
		n += m
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// readSome reads at least one byte: directly to p if range and memory are aligned, else
// through a buffer.
func (d *Device) readSome(p []byte, off int64) (int, error) {
	unit := int(d.unit.Load())
	if whole := len(p) &^ (unit - 1); whole > 0 && off%int64(unit) == 0 && isAligned(p, unit) {
		n, err := d.pread(p[:whole], off)
		if unit == directUnit || !errors.Is(err, unix.EINVAL) {
			return n, err
		}
		// The device needs a larger alignment than its sector size.
		d.unit.Store(directUnit)
	}
	b := directBuffers.Get().(*[]byte)
	defer directBuffers.Put(b)
	start := off &^ (directUnit - 1)
	skip := int(off - start)
	want := min((skip+len(p)+directUnit-1)&^(directUnit-1), len(*b))
	n, err := d.pread((*b)[:want], start)
	if err == nil && n <= skip {
		err = io.EOF // the end lies between start and off
	}
	if err != nil {
		return 0, err
	}
	return copy(p, (*b)[skip:n]), nil
}

func isAligned(p []byte, unit int) bool { return uintptr(unsafe.Pointer(&p[0]))%uintptr(unit) == 0 }

// pread reads once. Fewer bytes than len(p) mean that the device ends there. It does not go
// on after them as [os.File.ReadAt] does, because that offset would not be aligned.
func (d *Device) pread(p []byte, off int64) (int, error) {
	for {
		n, err := d.io.pread(p, off)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, &os.PathError{Op: "read", Path: d.path, Err: err}
		case n == 0:
			return 0, io.EOF
		default:
			return n, nil
		}
	}
}
