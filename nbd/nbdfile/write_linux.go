package nbdfile

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"xapi-nbd/internal/flush"
	"xapi-nbd/nbd/wire"
)

// writer has the methods of a file that was opened for writing.
type writer struct {
	d         *device
	fallocate func(fd int, mode uint32, off, n int64) error
	sync      func(fd int) error
	flushes   *flush.Group
}

func newWriter(d *device) *writer {
	return &writer{d: d, fallocate: unix.Fallocate, sync: unix.Fdatasync, flushes: flush.NewGroup()}
}

// WriteAt implements [io.WriterAt]. The bytes are on stable storage after the next Flush.
func (w *writer) WriteAt(p []byte, off int64) (int, error) {
	if err := w.d.inside(off, int64(len(p))); err != nil {
		return 0, err
	}
	return w.write(p, off)
}

func (w *writer) write(p []byte, off int64) (int, error) {
	if file := w.d.shared; file != nil && file.turns {
		file.writing.Lock()
		defer file.writing.Unlock()
	}
	return w.d.f.WriteAt(p, off)
}

// Flush implements [nbd.Flusher]. After it has failed once, it always fails: Linux reports
// lost writes only once.
func (w *writer) Flush() error {
	return w.flushes.Flush(func() error {
		err := again(func() error { return w.sync(w.d.fd) })
		if err != nil {
			return fmt.Errorf("flushing %s: %w", w.d.f.Name(), os.NewSyscallError("fdatasync", err))
		}
		return nil
	})
}

// The modes of fallocate. Block devices support them since Linux 4.9: there punchHole never
// writes zeroes instead, and zeroRange is the same as BLKZEROOUT.
const (
	punchHole = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	zeroRange = unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE
)

// Trim implements [nbd.Trimmer]. It does nothing where storage cannot be freed, and leaves
// out the sectors of a block device that are only partly in the range.
func (w *writer) Trim(off, n int64) error {
	if err := w.d.inside(off, n); err != nil {
		return err
	}
	begin, end := w.whole(off, n)
	if begin >= end {
		return nil
	}
	var err error
	if w.d.regular {
		err = w.allocate(punchHole, begin, end-begin)
	} else {
		err = w.discard(begin, end-begin)
	}
	if unsupported(err) {
		return nil
	}
	return err
}

// WriteZeroes implements [nbd.ZeroWriter]. It asks the kernel to zero the range. If that is
// not supported it writes zeroes, or fails with fast. With noHole a block device is not
// unmapped, and storage is reserved for a file.
//
// With fast it always fails for whole sectors of a block device. The kernel has a call that
// is either fast or fails (punchHole), but it zeroes the page cache before it asks the
// driver: if the driver refuses, the content has changed nevertheless.
func (w *writer) WriteZeroes(off, n int64, noHole, fast bool) error {
	if err := w.d.inside(off, n); err != nil {
		return err
	}
	begin, end := w.whole(off, n)
	if begin >= end {
		return w.writeZeroes(off, n) // less than two sectors: writing is fastest
	}
	if fast && !w.d.regular {
		return w.notFast()
	}
	if err := w.zero(begin, end-begin, noHole, fast); err != nil {
		return err
	}
	if err := w.writeZeroes(off, begin-off); err != nil {
		return err
	}
	return w.writeZeroes(end, off+n-end)
}

func (w *writer) notFast() error {
	return fmt.Errorf("no fast way to zero a range of %s: %w", w.d.f.Name(), wire.ENOTSUP)
}

// zero zeroes whole units.
func (w *writer) zero(off, n int64, noHole, fast bool) error {
	modes := []uint32{punchHole, zeroRange}
	if noHole {
		modes = modes[1:]
	}
	for _, mode := range modes {
		if err := w.allocate(mode, off, n); !unsupported(err) {
			return err
		}
	}
	if fast {
		return w.notFast()
	}
	return w.writeZeroes(off, n)
}

// whole returns the part of a range that consists of whole units; it is empty
// if begin is not below end.
func (w *writer) whole(off, n int64) (begin, end int64) {
	u := w.d.unit
	return (off + u - 1) / u * u, (off + n) / u * u
}

// zeroes is written by writeZeroes, as often as needed.
var zeroes [1 << 20]byte

func (w *writer) writeZeroes(off, n int64) error {
	for n > 0 {
		done, err := w.write(zeroes[:min(n, int64(len(zeroes)))], off)
		if err != nil {
			return err
		}
		off, n = off+int64(done), n-int64(done)
	}
	return nil
}

func (w *writer) allocate(mode uint32, off, n int64) error {
	err := again(func() error { return w.fallocate(w.d.fd, mode, off, n) })
	if file := w.d.shared; file != nil && !unsupported(err) {
		file.forget()
	}
	return os.NewSyscallError("fallocate", err)
}

// discard frees whole sectors of a block device.
func (w *writer) discard(off, n int64) error {
	span := [2]uint64{uint64(off), uint64(n)}
	return os.NewSyscallError("ioctl BLKDISCARD", again(func() error {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(w.d.fd), unix.BLKDISCARD, uintptr(unsafe.Pointer(&span)))
		if errno != 0 {
			return errno
		}
		return nil
	}))
}

// again calls f until it is not interrupted by a signal; Go's scheduler sends signals.
func again(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
