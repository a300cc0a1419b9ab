// Package blockdev opens block devices and files for reading and says how
// large they and their sectors are.
package blockdev

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Device is an open block device or regular file. ReadAt may be called
// concurrently and at any alignment. Close it once, after all reads have
// returned: a read in flight keeps the kernel's descriptor open behind Close.
type Device struct {
	f        *os.File
	size     int64
	minBlock uint32
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

// Open opens the device at path, which it waits for up to 5 s.
func Open(ctx context.Context, path string) (*Device, error) {
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	for {
		d, err := open(path)
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
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) || errors.Is(err, errEmpty)
}

func open(path string) (*Device, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	d := &Device{f: f}
	if err := d.measure(); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return d, nil
}

// measure asks how large the device and its sectors are. Seeking to the end
// gives BLKGETSIZE64's answer without its platform-dependent argument.
func (d *Device) measure() error {
	st, err := d.f.Stat()
	if err != nil {
		return err
	}
	isFile := st.Mode().IsRegular()
	if !isFile && st.Mode().Type() != fs.ModeDevice {
		return fmt.Errorf("neither a block device nor a regular file but %v", st.Mode().Type())
	}
	if d.size, err = d.f.Seek(0, io.SeekEnd); err != nil {
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

// ReadAt implements io.ReaderAt.
func (d *Device) ReadAt(p []byte, off int64) (int, error) { return d.f.ReadAt(p, off) }

// Size is in bytes and was taken when the device was opened.
func (d *Device) Size() int64 { return d.size }

// MinBlock is the unit of requests in bytes: a block device's logical sector
// size, 512 for a file, or 1 for a file whose size is no multiple of that.
func (d *Device) MinBlock() uint32 { return d.minBlock }

// Close closes the device.
func (d *Device) Close() error { return d.f.Close() }
