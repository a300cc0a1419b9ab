package nbdfile

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"xapi-nbd/internal/pagecache"
	"xapi-nbd/nbd"
	"xapi-nbd/nbd/wire"
)

// Options are the parameters of [Open].
type Options struct {
	// ReadOnly opens the file for reading only, even if its permissions allow writing.
	ReadOnly bool
	// Description is the text of NBD_INFO_DESCRIPTION, see [nbd.Describer]. Clients get none
	// if it is empty.
	Description string
	// Exclusive refuses a file that another process has locked by flock(2) or, as QEMU does, in
	// any part by fcntl(2), and a block device that is mounted or that another process has opened
	// exclusively. Until Close the same holds for others. The error of [Open] then matches [syscall.EAGAIN] or [syscall.EBUSY].
	Exclusive bool
	// Shared refuses a regular file that another process has opened with Exclusive. Until Close
	// Exclusive is refused.
	Shared bool
}

// Open opens the regular file or block device at path. The size of the device is that of the
// file now; the device never changes the size of the file. Several
// devices of one file read each other's writes at once, and flushing one of them flushes
// all.
//
// The device's methods may be called concurrently. The caller must close it when all calls
// have returned.
func Open(path string, opts Options) (nbd.Device, error) {
	// Before opening, because opening a named pipe would wait for its other end.
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() && st.Mode().Type() != fs.ModeDevice {
		return nil, fmt.Errorf("%s: neither a block device nor a regular file but %s", path, kind(st.Mode()))
	}
	flags := os.O_RDWR
	if opts.ReadOnly {
		flags = os.O_RDONLY
	}
	if opts.Exclusive && !st.Mode().IsRegular() {
		flags |= os.O_EXCL
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return nil, err
	}
	if st.Mode().IsRegular() {
		err = lock(int(f.Fd()), opts)
	}
	var d nbd.Device
	if err == nil {
		d, err = newDevice(f, opts)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return d, nil
}

// kind returns the kind of a file that is neither a block device nor a regular file.
func kind(mode fs.FileMode) string {
	switch {
	case mode.IsDir():
		return "a folder"
	case mode&fs.ModeNamedPipe != 0:
		return "a named pipe"
	case mode&fs.ModeSocket != 0:
		return "a socket"
	case mode&fs.ModeCharDevice != 0:
		return "a character device"
	}
	return mode.Type().String()
}

// lock locks a regular file until it is closed; an exclusive lock is one of both kinds.
func lock(fd int, opts Options) error {
	how := unix.LOCK_SH
	switch {
	case opts.Exclusive:
		how = unix.LOCK_EX
	case !opts.Shared:
		return nil
	}
	err := again(func() error { return unix.Flock(fd, how|unix.LOCK_NB) })
	if err != nil || !opts.Exclusive {
		return os.NewSyscallError("flock", err)
	}
	all := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
	if opts.ReadOnly {
		all.Type = unix.F_RDLCK // the kernel demands write access for the other one
	}
	err = again(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &all) })
	if unsupported(err) || errors.Is(err, unix.EINVAL) {
		return nil // then QEMU does not lock either
	}
	return os.NewSyscallError("fcntl F_OFD_SETLK", err)
}

// newDevice returns the type whose methods the file supports.
func newDevice(f *os.File, opts Options) (nbd.Device, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	d := &device{f: f, fd: int(f.Fd()), regular: st.Mode().IsRegular(), text: opts.Description}
	if err := d.measure(); err != nil {
		return nil, err
	}
	if !d.regular && !opts.ReadOnly {
		// The kernel permits opening a read-only device for writing.
		if err := d.refuseReadOnly(); err != nil {
			return nil, err
		}
	}
	if d.regular {
		if d.shared, err = share(d.fd); err != nil {
			return nil, err
		}
	}
	d.trail = pagecache.NewTrail(d.fd, d.size)
	switch {
	case d.regular && opts.ReadOnly:
		return readFile{d, extenter{d}}, nil
	case d.regular:
		return writeFile{d, extenter{d}, newWriter(d)}, nil
	case opts.ReadOnly:
		return d, nil
	default:
		return writeBlock{d, newWriter(d)}, nil
	}
}

// There is a type for each combination of capabilities. A block device that is read-only is
// a *device.
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

// device has the methods that every file supports.
type device struct {
	f       *os.File
	fd      int // of f
	regular bool
	shared  *shared // nil for a block device
	left    sync.Once
	size    int64
	unit    int64 // smallest range that the kernel zeroes or discards
	min     uint32
	text    string // Options.Description
	trail   *pagecache.Trail
}

// measure sets the size of the file and of its sectors. Seeking to the end returns the same
// size as BLKGETSIZE64, whose argument depends on the platform.
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

// Size returns the size in bytes that the file had when it was opened.
func (d *device) Size() int64 { return d.size }

// Close closes the file. It does not flush.
func (d *device) Close() error {
	if d.shared != nil {
		d.left.Do(d.shared.leave)
	}
	return d.f.Close()
}

// Description implements [nbd.Describer].
func (d *device) Description() string { return d.text }

// BlockSizes implements [nbd.BlockSizer]: the minimum is a block device's logical
// sector, and 1 for a file; the others are the protocol's defaults (0).
func (d *device) BlockSizes() (minimum, preferred, maxPayload uint32) { return d.min, 0, 0 }

// MultiConn implements [nbd.MultiConner]. It returns true, because all devices of a file
// use the kernel's page cache.
func (d *device) MultiConn() bool { return true }

// maxCache limits the bytes that one call of Cache reads: the kernel would read all of a
// range even if there is not enough memory.
const maxCache = wire.DefaultMaxPayload

// Cache implements [nbd.Cacher]. It starts to read the range, at most 32 MiB of
// it, into the page cache.
func (d *device) Cache(off, n int64) error {
	if err := d.inside(off, n); err != nil || n == 0 { // fadvise takes 0 for the rest of the file
		return err
	}
	err := unix.Fadvise(d.fd, off, min(n, maxCache), unix.FADV_WILLNEED)
	if unsupported(err) {
		return nil // reading in advance is optional
	}
	return os.NewSyscallError("fadvise", err)
}

// inside returns an error for ranges that are not in the device: the file must not grow.
func (d *device) inside(off, n int64) error {
	if off < 0 || n < 0 || n > d.size || off > d.size-n {
		return fmt.Errorf("%d bytes at %d of %s, which has %d: %w", n, off, d.f.Name(), d.size, unix.EINVAL)
	}
	return nil
}

// unsupported reports whether an error means that the kernel, the file system or the driver
// does not support a call, and so has changed nothing.
func unsupported(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.ENODEV)
}
