package blockdev

import (
	"errors"
	"io"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Reads past the page cache (O_DIRECT) go to aligned memory, from aligned offsets,
// in whole units: sectors of a block device. A page suits every sector size that
// there is, and is what a file gets, whose file system is not asked.
const (
	directUnit = 4096
	// directBounce is how much is read at a time for a reader whose memory or range
	// is not aligned.
	directBounce = 256 << 10
)

// openDirect opens a device past the page cache. Where the file system knows no
// such thing, file is nil without an error.
func openDirect(path string) (file *os.File, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if errors.Is(err, unix.EINVAL) {
		return nil, nil
	}
	return f, err
}

// directBuffers are for what has to be aligned first.
var directBuffers = sync.Pool{New: func() any {
	b := make([]byte, directBounce+directUnit)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & (directUnit - 1)
	b = b[skip : skip+directBounce]
	return &b
}}

// readDirect is ReadAt for a device that was opened past the page cache. The
// caller may ask for any range.
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

// readSome reads at least a byte: straight to p if that is aligned, else by way of
// a buffer.
func (d *Device) readSome(p []byte, off int64) (int, error) {
	unit := int(d.unit.Load())
	if whole := len(p) &^ (unit - 1); whole > 0 && off%int64(unit) == 0 && isAligned(p, unit) {
		n, err := d.pread(p[:whole], off)
		if unit == directUnit || !errors.Is(err, unix.EINVAL) {
			return n, err
		}
		// A device that wants more than its sectors tell.
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

// pread reads once. Fewer bytes than asked for mean that the device ends there;
// to go on from that, as [os.File.ReadAt] does, would not be aligned.
func (d *Device) pread(p []byte, off int64) (int, error) {
	for {
		n, err := unix.Pread(int(d.f.Fd()), p, off)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return 0, &os.PathError{Op: "read", Path: d.path, Err: err}
		case n == 0:
			return 0, io.EOF
		default:
			return n, nil
		}
	}
}
