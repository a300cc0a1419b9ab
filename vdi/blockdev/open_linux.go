// Package blockdev opens block devices and files for reading, says how large
// they and their sectors are, and notices when a device becomes another one.
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

// Device is an open block device or regular file. ReadAt may be called
// concurrently and at any alignment. Close it once, after all reads have
// returned: a read in flight keeps the kernel's descriptor open behind Close.
type Device struct {
	f        *os.File
	path     string
	node     unix.Stat_t // what path led to
	size     int64
	minBlock uint32
	binding  *binding // nil where a node cannot be bound anew
	direct   bool
	unit     atomic.Int32     // of direct reads, in bytes: a power of 2, at most directUnit
	trail    *pagecache.Trail // nil if direct
}

// fileSector is what a regular file is served with where its size allows.
const fileSector = 512

// The node may appear a little after the plug (udev), and a device may still be
// empty when it does.
const (
	openPause   = 50 * time.Millisecond
	openTimeout = 5 * time.Second
)

// errEmpty is a device of size 0, such as a loop device without a file.
var errEmpty = errors.New("device has size 0")

// Options say how a device is opened.
type Options struct {
	Roots Roots // where it is described; default those of a real host
	// Direct reads past the page cache, where that is possible; see Device.Direct.
	Direct bool
}

// Open opens the device at path, which it waits for up to 5 s.
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

// mayPass reports whether an error is one of a device that is still appearing.
func mayPass(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) ||
		errors.Is(err, errEmpty) || errors.Is(err, errUnbound) || errors.Is(err, ErrReplaced)
}

func open(path string, opts Options) (*Device, error) {
	// The binding first: what is opened afterwards is what it describes, or a
	// later one, which the check below tells.
	b, err := newBinding(path, opts.Roots)
	if err != nil {
		return nil, err
	}
	d := &Device{path: path, binding: b}
	if opts.Direct {
		d.f, err = openDirect(path)
		d.direct = d.f != nil
	}
	if d.f == nil && err == nil {
		d.f, err = os.Open(path)
	}
	if err == nil {
		err = d.measure()
	}
	if err == nil {
		err = d.Check()
	}
	if err != nil {
		d.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	d.unit.Store(directUnit)
	if d.node.Mode&unix.S_IFMT == unix.S_IFBLK {
		d.unit.Store(int32(min(d.minBlock, directUnit)))
	}
	if !d.direct {
		d.trail = pagecache.NewTrail(int(d.f.Fd()), d.size)
	}
	return d, nil
}

// measure asks how large the device and its sectors are.
func (d *Device) measure() error {
	if err := unix.Fstat(int(d.f.Fd()), &d.node); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	isFile := d.node.Mode&unix.S_IFMT == unix.S_IFREG
	if !isFile && d.node.Mode&unix.S_IFMT != unix.S_IFBLK {
		return errors.New("neither a block device nor a regular file")
	}
	var err error
	if d.size, err = d.CurrentSize(); err != nil {
		return err
	}
	switch {
	case d.size == 0:
		return errEmpty
	case !isFile:
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

// Direct reports whether the device is read past the page cache.
func (d *Device) Direct() bool { return d.direct }

// File is the open device, for callers that read it without ReadAt; see NoteRead. Nil if
// that would go through a page cache that is not to be used.
func (d *Device) File() *os.File {
	if d.direct {
		return nil
	}
	return d.f
}

// NoteRead records that n bytes at off were read, by ReadAt or from File, so that a
// large disk does not fill the page cache.
func (d *Device) NoteRead(off, n int64) {
	if d.trail != nil {
		d.trail.Read(off, n)
	}
}

// StopReadingAhead ends the kernel's reading ahead of this device, which does not stop at
// holes; see ReadAhead. It may be called while the device is being closed.
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

// Size is in bytes and was taken when the device was opened.
func (d *Device) Size() int64 { return d.size }

// CheckBinding returns an error matching ErrReplaced when the node may stand for
// another disk than the one that was opened. Called after a read, it tells
// whether what was read can be trusted: a node is disconnected, which it sees,
// before it is bound anew. It costs two short system calls, or nothing.
func (d *Device) CheckBinding() error {
	if d.binding == nil {
		return nil
	}
	return d.binding.check()
}

// Check is CheckBinding, and also looks whether the name still leads to the same
// node.
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

// BoundTo is the path of the socket that an NBD device of the kernel was bound to
// by xapi when it was opened, "" where that is not known. Its last element is
// the key of the image.
func (d *Device) BoundTo() string {
	if d.binding == nil {
		return ""
	}
	return d.binding.noted.Path
}

// Record is the record of the device's binding when it was opened; ok is false
// where there was none.
func (d *Device) Record() (r Record, ok bool) {
	if d.binding == nil || d.binding.record == nil {
		return Record{}, false
	}
	return d.binding.noted, true
}

// CurrentSize asks how large the device is now, in bytes: a VDI may be resized.
// Seeking to the end gives BLKGETSIZE64's answer without its platform-dependent
// argument.
func (d *Device) CurrentSize() (int64, error) { return d.f.Seek(0, io.SeekEnd) }

// MinBlock is the unit of requests in bytes: a block device's logical sector
// size, 512 for a file, or 1 for a file whose size is no multiple of that.
func (d *Device) MinBlock() uint32 { return d.minBlock }

// Close closes the device.
func (d *Device) Close() error {
	if d.binding != nil {
		d.binding.close()
	}
	if d.f == nil {
		return nil
	}
	return d.f.Close()
}
