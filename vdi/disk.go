package vdi

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"xapi-nbd/vdi/blockdev"
	"xapi-nbd/vdi/vhd"
)

// Disk is one user's share of an attachment. ReadAt may be called concurrently
// and at any alignment. Close gives the share back, once, after all ReadAt have
// returned; further calls do nothing.
type Disk struct {
	a        *attachment
	dev      *blockdev.Device
	size     int64 // at most the device's
	life     context.Context
	end      context.CancelCauseFunc
	abruptly atomic.Bool
	once     sync.Once
}

// newDisk returns the caller's share. Errors match [blockdev.ErrReplaced] when the
// device is not what was opened any more, and *SizeError when it does not hold
// the whole VDI.
//
// Its size is the VDI's virtual size of now, for which xapi is asked. With
// justOpened the size that was found when the device was opened will do.
func (a *attachment) newDisk(ctx context.Context, justOpened bool) (*Disk, error) {
	if err := a.dev.Check(); err != nil {
		return nil, err
	}
	size := a.virtualSize
	if !justOpened {
		record, err := a.vdiRecord(ctx, nil)
		if err != nil {
			return nil, err
		}
		size = record.VirtualSize
	}
	device, err := a.dev.CurrentSize()
	if err != nil {
		return nil, err
	}
	if err := checkSize(device, size); err != nil {
		return nil, err
	}
	d := &Disk{a: a, dev: a.dev, size: size}
	d.life, d.end = context.WithCancelCause(a.life)
	return d, nil
}

// ReadAt implements io.ReaderAt. What it returns without an error came from the
// disk that was attached: when somebody took the device away meanwhile, which
// may have put another disk behind the descriptor, that is an error matching
// [ErrLost], this time and from then on. It ends with io.EOF at Size, also where
// the device goes on, and where a device ends that has shrunk.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	if rest := max(d.size-off, 0); int64(len(p)) > rest {
		n, err := d.readAt(p[:rest], off)
		return n, cmp.Or(err, io.EOF)
	}
	return d.readAt(p, off)
}

// readAt is ReadAt for a range that ends at Size or before. Blocks without data are not
// read.
func (d *Disk) readAt(p []byte, off int64) (int, error) {
	known := d.a.blocks.known()
	if known == nil {
		return d.readDevice(p, off)
	}
	for done := 0; done < len(p); {
		data, n := runIn(known, off+int64(done), int64(len(p)-done))
		part := p[done : done+int(n)]
		if data {
			if n, err := d.readDevice(part, off+int64(done)); err != nil {
				return done + n, err
			}
		} else {
			clear(part)
			if err := d.Verify(off+int64(done), 0); err != nil {
				return done, err
			}
		}
		done += int(n)
	}
	return len(p), nil
}

// DataRun reports whether the block at off counts as data, and how many of the n bytes
// from off on are like it. What is not data reads as zeroes for as long as the Disk is
// open. While the images of the VDI are still being read DataRun waits, at most 2 s; if
// the blocks are not known, see [Blocks], all n bytes are data. The range must be inside
// [0, Size), and n above 0.
func (d *Disk) DataRun(off, n int64) (data bool, length int64) {
	<-d.a.blocks.done // at the latest when the attachment ends
	known := d.a.blocks.known()
	if known == nil {
		return true, n
	}
	return runIn(known, off, n)
}

// runIn is DataRun for blocks that are known. What a disk has grown by since then is
// data.
func runIn(known *vhd.BlockSet, off, n int64) (data bool, length int64) {
	if off >= known.Size() {
		return true, n
	}
	return known.Run(off, n)
}

// readDevice is readAt without what is known of the blocks.
func (d *Disk) readDevice(p []byte, off int64) (int, error) {
	n, err := d.dev.ReadAt(p, off)
	if lost := d.Verify(off, int64(n)); lost != nil {
		clear(p) // not ours
		return 0, lost
	}
	return n, err
}

// File is the open device, for reading without ReadAt. It stays open until Close. Data
// that was read from it is valid only if Verify succeeds afterwards. It is nil with
// DirectIO.
func (d *Disk) File() *os.File { return d.dev.File() }

// Verify must be called after n bytes at off were read from File. It returns the error
// that ReadAt would have returned if the data may be that of another disk.
func (d *Disk) Verify(off, n int64) error {
	d.dev.NoteRead(off, n)
	if d.a.life.Err() != nil {
		return context.Cause(d.a.life)
	}
	if err := d.dev.CheckBinding(); err != nil {
		d.a.lose(err)
		return fmt.Errorf("%w: %w", ErrLost, err)
	}
	return nil
}

// Size is the virtual size of the VDI in bytes, as it was when Attach returned.
func (d *Disk) Size() int64 { return d.size }

// BlockSizes are the size constraints in bytes: the minimum is the device's
// logical sector size, or the largest power of two below that which divides the
// size, and the others are the protocol's defaults (0).
func (d *Disk) BlockSizes() (minimum, preferred, maxPayload uint32) {
	return uint32(min(int64(d.dev.MinBlock()), d.size&-d.size)), 0, 0
}

// Description is a text for people: the VDI's uuid and name.
func (d *Disk) Description() string { return d.a.description }

// CanonicalName is the VDI's part of the export name: it carries no session.
func (d *Disk) CanonicalName() string { return "/" + d.a.vdi }

// Lifetime ends when the disk is no longer to be served, with the reason as its
// cause: the device was taken away ([ErrLost]) or this share was revoked.
func (d *Disk) Lifetime() context.Context { return d.life }

// Revoke ends this share, and no other, for the reason given.
func (d *Disk) Revoke(reason error) { d.end(reason) }

// CloseWithError is Close after a connection that ended with err. If err is not nil and
// the disk was not revoked, the client may come back, so the attachment may linger.
func (d *Disk) CloseWithError(err error) error {
	d.abruptly.Store(err != nil && d.life.Err() == nil)
	return d.Close()
}

// Close returns at once; the last user's starts the detach, which
// [Manager.Close] waits for, or lets the attachment linger.
func (d *Disk) Close() error {
	d.once.Do(func() {
		d.end(errUnused)
		d.a.m.release(d.a, d.abruptly.Load())
	})
	return nil
}
