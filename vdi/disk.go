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

// Disk is a VDI opened for reading, or the part of a [WritableDisk] that reads. Several Disks of one VDI share its attachment. All
// methods but Close and CloseWithError may be called concurrently, and ReadAt at any
// alignment. Call Close or CloseWithError after all other calls have returned.
type Disk struct {
	a        *attachment
	dev      *blockdev.Device
	size     int64 // at most the device's
	life     context.Context
	end      context.CancelCauseFunc
	abruptly atomic.Bool // the connection was lost, so the client may come back
	once     sync.Once
	next     atomic.Int64 // the end of the last read
}

// newDisk returns a Disk of the attachment. Its size is the current virtual size of the
// VDI, for which it asks xapi; with justOpened it takes the size found when the device was
// opened. The error matches [blockdev.ErrReplaced] if the device is not the one that was
// opened, and *SizeError if it is smaller than the VDI.
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
	d.life, d.end = context.WithCancelCause(a.lifetime)
	return d, nil
}

// ReadAt implements io.ReaderAt. Data returned without an error is that of the attached
// VDI. If the device was taken away, so that the descriptor may lead to another disk,
// ReadAt returns an error that matches [ErrLost], and so do all later calls. It returns
// io.EOF at Size even if the device is larger, and at the end of a device that has shrunk.
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

// DataRun reports whether the block at off may have data, and how many of the n bytes from
// off on are like it. A range without data reads as zeroes as long as the Disk is open.
// DataRun waits up to 2 s while the images of the VDI are being read. If the allocation is
// unknown, see [Blocks], all n bytes may have data. The range must be inside [0, Size),
// and n above 0.
func (d *Disk) DataRun(off, n int64) (data bool, length int64) {
	<-d.a.blocks.done // closed at the latest when the attachment ends
	known := d.a.blocks.known()
	if known == nil {
		return true, n
	}
	return runIn(known, off, n)
}

// runIn is DataRun for a known allocation. The part by which the disk has grown since the
// images were read may have data.
func runIn(known *vhd.BlockSet, off, n int64) (data bool, length int64) {
	if off >= known.Size() {
		return true, n
	}
	return known.Run(off, n)
}

// readDevice reads from the device, and verifies afterwards that it is still the same.
func (d *Disk) readDevice(p []byte, off int64) (int, error) {
	n, err := d.dev.ReadAt(p, off)
	if lost := d.Verify(off, int64(n)); lost != nil {
		clear(p) // may be data of another disk
		return 0, lost
	}
	return n, err
}

// File returns the open device, for reading without ReadAt. It stays open until Close.
// Data read from it is valid only if Verify succeeds afterwards. File returns nil if the
// device is read with direct I/O.
func (d *Disk) File() *os.File { return d.dev.File() }

// minAhead is the length, in bytes, of the shortest read behind which readAhead reads.
const minAhead = 64 << 10

// readAhead is called after n bytes at off were read. If the reader is sequential, it makes
// the kernel read the next n bytes into the page cache, up to the next hole. Where holes
// are known this replaces the kernel's own reading ahead, for readers with a single request
// in flight. It does nothing for an attachment whose clients have asked for changed blocks,
// as they read only those.
func (d *Disk) readAhead(off, n int64) {
	end := off + n
	known := d.a.blocks.known()
	if known == nil || len(d.a.changed) > 0 || n < minAhead || end >= d.size {
		return
	}
	if d.next.Swap(end) != off || off == 0 {
		return // not sequential, or not yet
	}
	if data, length := runIn(known, end, min(n, d.size-end)); data {
		d.dev.ReadAhead(end, length)
	}
}

// Verify must be called after n bytes at off were read from File. It returns an error that
// matches [ErrLost], or the reason of the end of the attachment, if the data may be that of
// another disk.
func (d *Disk) Verify(off, n int64) error {
	d.dev.NoteRead(off, n)
	d.readAhead(off, n)
	return d.a.verify()
}

// verify returns an error that matches [ErrLost], or the reason of the end of the
// attachment, if the device may not be the attached VDI any more.
func (a *attachment) verify() error {
	if a.lifetime.Err() != nil {
		return context.Cause(a.lifetime)
	}
	if err := a.dev.CheckBinding(); err != nil {
		a.lose(err)
		return fmt.Errorf("%w: %w", ErrLost, err)
	}
	return nil
}

// Size returns the virtual size of the VDI in bytes when Attach returned.
func (d *Disk) Size() int64 { return d.size }

// BlockSizes returns the block size constraints of the NBD protocol in bytes: the minimum
// is the device's logical sector size, or the largest smaller power of two that divides
// Size. The others are 0: the defaults of the protocol.
func (d *Disk) BlockSizes() (minimum, preferred, maxPayload uint32) {
	return uint32(min(int64(d.dev.MinBlock()), d.size&-d.size)), 0, 0
}

// Description returns the VDI's uuid and name, as the description of the NBD export.
func (d *Disk) Description() string { return d.a.description }

// CanonicalName returns the export name without the session: "/" and the VDI's uuid.
func (d *Disk) CanonicalName() string { return "/" + d.a.vdi }

// Lifetime returns a context that ends when the Disk must not be served any more. Its
// cause is the reason: the device was taken away ([ErrLost]), the manager was closed
// ([ErrClosed]), Revoke was called, or somebody else uses a VDI that is written
// (*[ExclusiveError]).
func (d *Disk) Lifetime() context.Context { return d.life }

// Revoke ends the Lifetime of this Disk, and of no other, with the given cause.
func (d *Disk) Revoke(reason error) { d.end(reason) }

// CloseWithError is Close after a connection that ended with err. If err is not nil and
// Lifetime has not ended, the client may come back, and the attachment stays for the time
// of [Limits].Linger.
func (d *Disk) CloseWithError(err error) error {
	d.abruptly.Store(err != nil && d.life.Err() == nil)
	return d.Close()
}

// Close releases the Disk. It returns nil at once; further calls do nothing. After the last
// Disk of a VDI the detach begins in the background; [Manager.Close] waits for it.
func (d *Disk) Close() error {
	d.once.Do(func() {
		d.end(errUnused)
		d.a.m.release(d.a, d.abruptly.Load())
	})
	return nil
}
