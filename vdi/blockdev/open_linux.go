package blockdev

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"xapi-nbd/internal/pagecache"
)

// Device is an open block device or regular file. Its methods but Close may be called
// concurrently, and at any alignment. Close it once, after all other calls but StopReadingAhead
// have returned: they use the number of the descriptor, which another file may have after Close.
type Device struct {
	f        *os.File
	io       storage // reads and writes f
	path     string
	node     unix.Stat_t // of path when it was opened
	size     int64
	minBlock uint32
	binding  *binding // nil if the node cannot be bound again while it is open
	direct   bool
	unit     atomic.Int32     // of direct reads, in bytes: a power of 2, at most directUnit
	trail    *pagecache.Trail // nil if direct
	writer   *writer          // nil if opened for reading

	mayChange func() error // Options.MayChange; nil: always
}

// fileSector is the sector size of a regular file if its size is a multiple of it.
const fileSector = 512

// The node may appear a little after the plug (udev), and a device may still be
// empty when it does.
const (
	openPause   = 50 * time.Millisecond
	openTimeout = 5 * time.Second
)

// errEmpty means that a device has size 0, as a loop device without a file.
var errEmpty = errors.New("device has size 0")

// Options say how a device is opened.
type Options struct {
	Roots Roots // default: those of a real host
	// Direct makes reads bypass the page cache if the device supports it; see
	// [Device.Direct].
	Direct bool
	// Write opens the device for writing too. A block device that is mounted, or that another
	// program has claimed (LVM, for example), is refused with EBUSY, and nobody can claim it
	// while it is open; one that is read-only is refused with EROFS. Reads and writes bypass
	// the page cache as with Direct.
	Write bool
	// MayChange, if not nil, is called right before each system call that changes the content
	// of the device. It may wait. If it returns an error, the call is not made, and the error
	// is that of the write.
	MayChange func() error
}

// Open opens the device at path. It waits up to 5 s until the device exists, has a size
// above 0, is bound, and may be claimed.
func Open(ctx context.Context, path string, opts Options) (*Device, error) {
	opts.Roots = opts.Roots.withDefaults()
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	for {
		d, err := open(path, opts)
		if err == nil || !mayPass(err) {
			return d, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(openPause):
		}
	}
}

// mayPass reports whether an error may be due to a device that is just being plugged.
func mayPass(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) ||
		errors.Is(err, unix.EBUSY) || errors.Is(err, errEmpty) || errors.Is(err, errUnbound) || errors.Is(err, ErrReplaced)
}

func open(path string, opts Options) (*Device, error) {
	// The binding is read first: the device that is opened afterwards has this binding or
	// a later one, and in that case Check below fails.
	b, err := newBinding(path, opts.Roots)
	if err != nil {
		return nil, err
	}
	d := &Device{path: path, binding: b, mayChange: opts.MayChange}
	err = d.openFile(opts)
	if err == nil {
		err = d.measure()
	}
	if err == nil && opts.Write {
		err = d.prepareWriting(opts.Roots)
	}
	if err == nil {
		err = d.Check()
	}
	if err != nil {
		d.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	d.unit.Store(directUnit)
	if !d.isFile() {
		d.unit.Store(int32(min(d.minBlock, directUnit)))
	}
	if !d.direct {
		d.trail = pagecache.NewTrail(int(d.f.Fd()), d.size)
	}
	return d, nil
}

// openFile opens the path, past the page cache if the options want that and the file system
// supports it.
func (d *Device) openFile(opts Options) (err error) {
	flags := os.O_RDONLY
	if opts.Write {
		flags = os.O_RDWR | unix.O_EXCL
	}
	if opts.Direct || opts.Write {
		d.f, err = openDirect(d.path, flags)
		d.direct = d.f != nil
	}
	if d.f == nil && err == nil {
		d.f, err = os.OpenFile(d.path, flags, 0)
	}
	d.io = kernel{d.f}
	return err
}

// isFile reports whether the device is a regular file. Otherwise it is a block device.
func (d *Device) isFile() bool { return d.node.Mode&unix.S_IFMT == unix.S_IFREG }

// measure reads the size of the device and of its sectors.
func (d *Device) measure() error {
	if err := unix.Fstat(int(d.f.Fd()), &d.node); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if !d.isFile() && d.node.Mode&unix.S_IFMT != unix.S_IFBLK {
		return errors.New("neither a block device nor a regular file")
	}
	var err error
	if d.size, err = d.CurrentSize(); err != nil {
		return err
	}
	switch {
	case d.size == 0:
		return errEmpty
	case !d.isFile():
		d.minBlock, err = unix.IoctlGetUint32(int(d.f.Fd()), unix.BLKSSZGET)
		return os.NewSyscallError("ioctl BLKSSZGET", err)
	case d.size%fileSector == 0:
		d.minBlock = fileSector
	default:
		d.minBlock = 1 // every byte is served, so no larger unit is true
	}
	return nil
}

// ReadAt implements io.ReaderAt. The caller must call NoteRead.
func (d *Device) ReadAt(p []byte, off int64) (int, error) {
	if d.direct {
		return d.readDirect(p, off)
	}
	return d.f.ReadAt(p, off)
}

// Direct reports whether reads bypass the page cache.
func (d *Device) Direct() bool { return d.direct }

// File returns the open device, for callers that read it without ReadAt; see NoteRead. It
// returns nil if reads bypass the page cache or the device was opened for writing.
func (d *Device) File() *os.File {
	if d.direct || d.writer != nil {
		return nil
	}
	return d.f
}

// NoteRead must be called after n bytes at off were read, by ReadAt or from File. It drops
// them from the page cache, which a large disk would fill otherwise.
func (d *Device) NoteRead(off, n int64) {
	if d.trail != nil {
		d.trail.Read(off, n)
	}
}

// StopReadingAhead turns off the read-ahead of the kernel for this device, which does not
// stop at holes; see ReadAhead. It may be called while the device is being closed.
func (d *Device) StopReadingAhead() {
	raw, err := d.f.SyscallConn()
	if err != nil || d.direct {
		return
	}
	_ = raw.Control(func(fd uintptr) { // fails once the device is closed
		_ = unix.Fadvise(int(fd), 0, 0, unix.FADV_RANDOM) // advice
	})
}

// ReadAhead makes the kernel read n bytes at off into the page cache, and does not wait
// for them. It does nothing for a direct device.
func (d *Device) ReadAhead(off, n int64) {
	if !d.direct {
		_ = unix.Fadvise(int(d.f.Fd()), off, n, unix.FADV_WILLNEED) // advice
	}
}

// Size returns the size in bytes when the device was opened.
func (d *Device) Size() int64 { return d.size }

// CheckBinding returns an error that matches ErrReplaced if the node may lead to another
// disk than the one that was opened. If it returns nil after a read, the data are those of
// the disk that was opened: a node is disconnected, which CheckBinding notices, before it is
// bound again. It takes two short system calls, or none.
func (d *Device) CheckBinding() error {
	if d.binding == nil {
		return nil
	}
	return d.binding.check()
}

// Check is CheckBinding, and also checks that the path still leads to the same node.
func (d *Device) Check() error {
	if err := d.CheckBinding(); err != nil {
		return err
	}
	var now unix.Stat_t
	if err := unix.Stat(d.path, &now); err != nil {
		return fmt.Errorf("%w: %w", ErrReplaced, &os.PathError{Op: "stat", Path: d.path, Err: err})
	}
	sameFile := now.Dev == d.node.Dev && now.Ino == d.node.Ino
	sameDevice := now.Mode&unix.S_IFMT == unix.S_IFBLK && now.Rdev == d.node.Rdev
	if !sameFile && !sameDevice {
		return fmt.Errorf("%w: %s leads elsewhere", ErrReplaced, d.path)
	}
	return nil
}

// BoundTo returns the path of the socket to which xapi had bound an NBD device of the kernel
// when it was opened; "" if it is not known. Its last element is the key of the image.
func (d *Device) BoundTo() string {
	if d.binding == nil {
		return ""
	}
	return d.binding.noted.Path
}

// Record returns the record of the device's binding when it was opened; ok is false if there
// was none.
func (d *Device) Record() (r Record, ok bool) {
	if d.binding == nil || d.binding.record == nil {
		return Record{}, false
	}
	return d.binding.noted, true
}

// CurrentSize returns the current size of the device in bytes: a VDI may be resized. A seek
// to the end gives the result of BLKGETSIZE64 without its platform-dependent argument.
func (d *Device) CurrentSize() (int64, error) { return d.f.Seek(0, io.SeekEnd) }

// MinBlock returns the sector size in bytes: the logical sector size of a block device, 512
// for a file, or 1 for a file whose size is no multiple of 512.
func (d *Device) MinBlock() uint32 { return d.minBlock }

// Close closes the device. No other call may be in flight, see [Device].
func (d *Device) Close() error {
	if d.binding != nil {
		d.binding.close()
	}
	if d.f == nil {
		return nil
	}
	return d.f.Close()
}
