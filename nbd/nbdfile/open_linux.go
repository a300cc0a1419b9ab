package nbdfile

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"xapi-nbd/internal/pagecache"
	"xapi-nbd/nbd"
	"xapi-nbd/nbd/wire"
)

// Options say how a file is opened.
type Options struct {
	// ReadOnly opens the file for reading only; the device then cannot be
	// written, whatever the file's permissions are.
	ReadOnly bool
}

// Open opens the regular file or block device at path. The size is taken now
// and does not change: the device neither grows nor shrinks the file. Nothing
// is locked; several devices of one file see each other's writes at once, and
// flushing one flushes all.
//
// The device's methods may be called concurrently. The caller closes it, after
// all calls have returned.
func Open(path string, opts Options) (nbd.Device, error) {
	// Asked before opening: that of a pipe would wait for its other end.
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() && st.Mode().Type() != fs.ModeDevice {
		return nil, fmt.Errorf("%s: neither a block device nor a regular file but %v", path, st.Mode().Type())
	}
	flags := os.O_RDWR
	if opts.ReadOnly {
		flags = os.O_RDONLY
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return nil, err
	}
	d, err := newDevice(f, opts)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return d, nil
}

// newDevice picks the type that has the methods which hold for the file.
func newDevice(f *os.File, opts Options) (nbd.Device, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	d := &device{f: f, fd: int(f.Fd()), regular: st.Mode().IsRegular()}
	if err := d.measure(); err != nil {
		return nil, err
	}
	if !d.regular && !opts.ReadOnly {
		// The kernel lets a read-only device be opened for writing.
		if err := d.refuseReadOnly(); err != nil {
			return nil, err
		}
	}
	d.trail = pagecache.NewTrail(d.fd, d.size)
	switch {
	case d.regular && opts.ReadOnly:
		return readFile{d, extenter{d, new(atomic.Pointer[span])}}, nil
	case d.regular:
		return writeFile{d, extenter{d: d}, newWriter(d)}, nil
	case opts.ReadOnly:
		return d, nil
	default:
		return writeBlock{d, newWriter(d)}, nil
	}
}

// Each combination of capabilities is a type; a block device to read is the
// bare device.
type (
	readFile struct {
		*device
		extenter
	}
	writeFile struct {
		*device
		extenter
		*writer
	}
	writeBlock struct {
		*device
		*writer
	}
)

// device is what can be done with every file.
type device struct {
	f       *os.File
	fd      int // of f
	regular bool
	size    int64
	unit    int64 // smallest range that the kernel zeroes or discards
	min     uint32
	trail   *pagecache.Trail
}

// measure asks how large the file and its sectors are. Seeking to the end gives
// BLKGETSIZE64's answer without its platform-dependent argument.
func (d *device) measure() (err error) {
	if d.size, err = d.f.Seek(0, io.SeekEnd); err != nil {
		return err
	}
	if d.regular {
		d.min, d.unit = 1, 1 // the kernel reads and writes any byte of a file
		return nil
	}
	d.min, err = unix.IoctlGetUint32(d.fd, unix.BLKSSZGET)
	d.unit = int64(d.min)
	return os.NewSyscallError("ioctl BLKSSZGET", err)
}

func (d *device) refuseReadOnly() error {
	ro, err := unix.IoctlGetUint32(d.fd, unix.BLKROGET)
	if err == nil && ro != 0 {
		return fmt.Errorf("opening for writing: %w", unix.EROFS)
	}
	return os.NewSyscallError("ioctl BLKROGET", err)
}

// ReadAt implements [io.ReaderAt].
func (d *device) ReadAt(p []byte, off int64) (int, error) {
	n, err := d.f.ReadAt(p, off)
	d.trail.Read(off, int64(n))
	return n, err
}

// File implements [nbd.FileBacked].
func (d *device) File() *os.File { return d.f }

// Verify implements [nbd.FileBacked]. It never fails.
func (d *device) Verify(off, n int64) error {
	d.trail.Read(off, n)
	return nil
}

// Size is in bytes and was taken when the file was opened.
func (d *device) Size() int64 { return d.size }

// Close closes the file. It does not flush.
func (d *device) Close() error { return d.f.Close() }

// BlockSizes implements [nbd.BlockSizer]: the minimum is a block device's logical
// sector, and 1 for a file; the others are the protocol's defaults (0).
func (d *device) BlockSizes() (minimum, preferred, maxPayload uint32) { return d.min, 0, 0 }

// MultiConn implements [nbd.MultiConner]: all who open a file share the
// kernel's page cache.
func (d *device) MultiConn() bool { return true }

// maxCache is how much is read ahead for one call: the kernel would read as
// much as it is told to, whether there is memory or not.
const maxCache = wire.DefaultMaxPayload

// Cache implements [nbd.Cacher]. It starts to read the range, at most 32 MiB of
// it, into the page cache.
func (d *device) Cache(off, n int64) error {
	if err := d.inside(off, n); err != nil || n == 0 { // 0 would mean everything
		return err
	}
	err := unix.Fadvise(d.fd, off, min(n, maxCache), unix.FADV_WILLNEED)
	if unsupported(err) {
		return nil // it was advice
	}
	return os.NewSyscallError("fadvise", err)
}

// inside refuses ranges that are not in the device: the file must not grow.
func (d *device) inside(off, n int64) error {
	if off < 0 || n < 0 || n > d.size || off > d.size-n {
		return fmt.Errorf("%d bytes at %d of %s, which has %d: %w", n, off, d.f.Name(), d.size, unix.EINVAL)
	}
	return nil
}

// unsupported reports whether an error says that the kernel, the file system or
// the driver cannot do what it was asked for, and so did nothing of it.
func unsupported(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.ENODEV)
}
