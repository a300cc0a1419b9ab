package vdi

import (
	"context"
	"errors"
	"sync/atomic"

	"xapi-nbd/xapi"
)

// AttachWritable returns the VDI with the given uuid for reading and writing. The caller
// closes the Disk. The attachment belongs to session s: calls with the same session join it,
// and everybody else is refused while it exists. It is not joined to one for reading, and
// does not wait for one that is in use. The caller must have checked that s is valid and may
// plug.
//
// The VDI must be exclusively ours: before the VBD is created, after the plug and every
// second from then on the rules of [ExclusiveError] are checked. That detects other users of
// the VDI and cannot keep them away: a write that is in progress when a VM starts is not
// undone. AttachWritable returns an *ExclusiveError if a rule is broken; for other errors and
// for the time that it takes see [Manager.Attach].
//
// The attachment does not linger.
func (m *Manager) AttachWritable(ctx context.Context, s *xapi.Session, vdiUUID string) (*WritableDisk, error) {
	d, err := m.attachDisk(ctx, s, request{vdi: vdiUUID, writer: s.Ref()})
	if err != nil {
		return nil, err
	}
	return &WritableDisk{Disk: d}, nil
}

// WritableDisk is a VDI opened for reading and writing. Its methods may be called
// concurrently as those of [Disk]; so may those of several WritableDisks of one VDI.
//
// A change begins only while the VDI is exclusively ours; see [Manager.AttachWritable]. When
// it is not any more, Lifetime ends, and changes return its cause. While xapi does not tell,
// changes wait: from 10 s after the last answer, for two minutes.
type WritableDisk struct {
	*Disk
	written atomic.Int64 // bytes that were written or zeroed
}

// errRange means that a change does not lie in the VDI. The device may be larger.
var errRange = errors.New("the range is not within the VDI")

func (d *WritableDisk) inside(off, n int64) error {
	if off < 0 || n < 0 || off > d.size-n {
		return errRange
	}
	return nil
}

// maxChange is the most bytes, of a range without a payload, that are changed before the guard
// is asked again: one request may be for gigabytes.
const maxChange = 16 << 20

// inPieces calls do for the pieces of a range, one after the other, until one fails.
func (d *WritableDisk) inPieces(off, n int64, do func(off, n int64) error) error {
	if err := d.inside(off, n); err != nil {
		return err
	}
	for n > 0 {
		piece := min(n, maxChange)
		if err := do(off, piece); err != nil {
			return err
		}
		off, n = off+piece, n-piece
	}
	return nil
}

// change calls do, which changes n bytes at off, if the VDI may be written. If the device was
// taken away before or during the change, it returns an error that matches [ErrLost].
func (d *WritableDisk) change(off, n int64, do func() error) error {
	if err := d.inside(off, n); err != nil {
		return err
	}
	if err := d.a.guard.wait(d.life); err != nil {
		return err
	}
	if err := d.a.verify(); err != nil {
		return err
	}
	err := do()
	if lost := d.a.verify(); lost != nil {
		return lost
	}
	return err
}

// count is change for changes that give the bytes a value.
func (d *WritableDisk) count(off, n int64, do func() error) error {
	err := d.change(off, n, do)
	if err == nil {
		d.written.Add(n)
		d.a.written.Add(n)
	}
	return err
}

// WriteAt implements io.WriterAt. The bytes are with the storage when it returns, so that an
// error of the storage is the error of its write; see package blockdev.
func (d *WritableDisk) WriteAt(p []byte, off int64) (int, error) {
	n := 0
	err := d.count(off, int64(len(p)), func() (err error) {
		n, err = d.dev.WriteAt(p, off)
		return err
	})
	return n, err
}

// WriteFUA writes all bytes of p, and returns when they are on stable storage.
func (d *WritableDisk) WriteFUA(p []byte, off int64) error {
	return d.count(off, int64(len(p)), func() error { return d.dev.WriteFUA(p, off) })
}

// Flush returns when all changes that have returned before are on stable storage, as far as
// the device has it.
func (d *WritableDisk) Flush() error { return d.change(0, 0, d.dev.Flush) }

// Trim frees the storage of a range, whose content is not defined afterwards.
func (d *WritableDisk) Trim(off, n int64) error {
	return d.inPieces(off, n, func(off, n int64) error {
		return d.change(off, n, func() error { return d.dev.Trim(off, n) })
	})
}

// TrimFUA is Trim, and returns when the change is on stable storage.
func (d *WritableDisk) TrimFUA(off, n int64) error {
	return d.inPieces(off, n, func(off, n int64) error {
		return d.change(off, n, func() error { return d.dev.TrimFUA(off, n) })
	})
}

// WriteZeroes makes a range read as zeroes. With noHole its storage stays allocated. With
// fast it fails with an error that matches syscall.ENOTSUP unless it is much faster than
// writing zeroes.
func (d *WritableDisk) WriteZeroes(off, n int64, noHole, fast bool) error {
	return d.inPieces(off, n, func(off, n int64) error {
		return d.count(off, n, func() error { return d.dev.WriteZeroes(off, n, noHole, fast) })
	})
}

// WriteZeroesFUA is WriteZeroes, and returns when the change is on stable storage.
func (d *WritableDisk) WriteZeroesFUA(off, n int64, noHole, fast bool) error {
	return d.inPieces(off, n, func(off, n int64) error {
		return d.count(off, n, func() error { return d.dev.WriteZeroesFUA(off, n, noHole, fast) })
	})
}

// CanTrim reports whether Trim can free storage. If not, it fails.
func (d *WritableDisk) CanTrim() bool { return d.dev.CanTrim() }

// CloseWithError is Close after a connection that ended with err. If err is not nil and the
// Disk was changed, the log gets the number of bytes: the client may not have written all.
func (d *WritableDisk) CloseWithError(err error) error {
	if n := d.written.Load(); err != nil && n > 0 {
		d.a.log.Warn("incomplete write: the connection ended without a disconnect", "vbd", d.a.vbdUUID, "bytes", n, "err", err)
	}
	return d.Disk.CloseWithError(err)
}

// flushLast flushes the device before it is closed and unplugged. After a forbidden use or a
// lost device there is nothing to flush, and the disk may be another one.
func (a *attachment) flushLast() {
	var broken *ExclusiveError
	if cause := context.Cause(a.lifetime); errors.As(cause, &broken) || errors.Is(cause, ErrLost) {
		return
	}
	err := a.dev.Check()
	if err == nil {
		err = a.dev.Flush()
	}
	n := a.written.Load()
	switch {
	case err != nil:
		a.log.Error("incomplete write: the device cannot be flushed", "vbd", a.vbdUUID, "bytes", n, "err", err)
	case n > 0:
		a.log.Info("writes flushed", "vbd", a.vbdUUID, "bytes", n)
	}
}
