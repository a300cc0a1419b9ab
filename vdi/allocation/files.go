package allocation

import (
	"io"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// identity identifies a file or a device on this host.
type identity struct {
	dev, ino uint64 // of a file; for a device its number, and 0
}

// file is an open image.
type file interface {
	io.ReaderAt // at multiples of 512 bytes, in lengths of such
	io.Closer
	identify() (identity, error)
}

// fileSystem opens images. Tests replace it.
type fileSystem interface {
	// readLink returns the target of a symbolic link.
	readLink(path string) (string, error)
	// open opens an image for reading.
	open(path string) (file, error)
}

// hostFiles is the file system of this host.
type hostFiles struct{}

func (hostFiles) readLink(path string) (string, error) { return os.Readlink(path) }

// open opens an image past the page cache. There is no fallback: on a shared file
// system the page cache may hold an image as it was before another host changed it.
func (hostFiles) open(path string) (file, error) {
	// O_NONBLOCK: path may lead to a named pipe, which must not block.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	return &directFile{f: f}, nil
}

// directFile is a file or device that was opened with O_DIRECT. It is not safe for
// concurrent use.
type directFile struct {
	f      *os.File
	buffer []byte // aligned
}

// Direct reads begin at multiples of directUnit and go to memory with that alignment:
// the largest size of a sector.
const (
	directUnit   = 4096
	directBuffer = 256<<10 + directUnit // one read of a table, at any sector
)

// ReadAt implements io.ReaderAt for reads of up to 256 KiB.
func (d *directFile) ReadAt(p []byte, off int64) (int, error) {
	if d.buffer == nil {
		d.buffer = alignedBuffer(directBuffer)
	}
	start := off &^ (directUnit - 1)
	skip := int(off - start)
	want := min((skip+len(p)+directUnit-1)&^(directUnit-1), len(d.buffer))
	n, err := d.pread(d.buffer[:want], start)
	if err != nil {
		return 0, &os.PathError{Op: "read", Path: d.f.Name(), Err: err}
	}
	if n <= skip {
		return 0, io.EOF
	}
	if n = copy(p, d.buffer[skip:n]); n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (d *directFile) pread(p []byte, off int64) (int, error) {
	for {
		n, err := unix.Pread(int(d.f.Fd()), p, off)
		if err != unix.EINTR {
			return n, err
		}
	}
}

func (d *directFile) Close() error { return d.f.Close() }

func (d *directFile) identify() (identity, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(d.f.Fd()), &st); err != nil {
		return identity{}, os.NewSyscallError("fstat", err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		return identity{dev: uint64(st.Rdev)}, nil
	}
	return identity{dev: uint64(st.Dev), ino: st.Ino}, nil
}

// alignedBuffer returns n bytes that begin at a multiple of directUnit in memory.
func alignedBuffer(n int) []byte {
	b := make([]byte, n+directUnit)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & (directUnit - 1)
	return b[skip : skip+n : skip+n]
}
