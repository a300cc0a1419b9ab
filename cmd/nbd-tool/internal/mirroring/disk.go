package mirroring

import (
	"context"
	"errors"
	"sync/atomic"

	"xapi-nbd/mirror"
	"xapi-nbd/nbd"
	"xapi-nbd/nbd/wire"
)

// Disk is a mirrored disk as an [nbd.Exporter]. [NewDisk] makes one.
type Disk struct {
	target mirror.Device
	name   string
	flags  wire.TransmissionFlags
	ctx    context.Context // see nbd.Revocable
	end    context.CancelCauseFunc
	lost   atomic.Int64 // times that the mirror has lost changes that were not flushed
}

// NewDisk returns the export of a mirror for clients that ask for name. It offers what the
// primary can do.
func NewDisk(target mirror.Device, name string, primary *End) *Disk {
	d := &Disk{target: target, name: name, flags: wire.FlagSendWriteZeroes | wire.FlagCanMultiConn}
	if primary.CanFlush() {
		d.flags |= wire.FlagSendFlush
	}
	if primary.CanTrim() {
		d.flags |= wire.FlagSendTrim
	}
	d.ctx, d.end = context.WithCancelCause(context.Background())
	return d
}

// End ends the connections of all clients, and calls that are in progress.
func (d *Disk) End(reason error) { d.end(reason) }

// Open implements [nbd.Exporter].
func (d *Disk) Open(_ context.Context, _ nbd.Peer, name string) (nbd.Device, error) {
	if name != d.name {
		return nil, nbd.Refuse(nbd.ErrUnknownExport, "no such export", nil)
	}
	if d.ctx.Err() != nil {
		return nil, nbd.Refuse(nbd.ErrShutdown, "the mirror has ended", nil)
	}
	dev := &device{disk: d}
	dev.told.Store(d.lost.Load())
	return dev, nil
}

// List implements [nbd.Lister].
func (d *Disk) List(context.Context, nbd.Peer) ([]nbd.Export, error) {
	return []nbd.Export{{Name: d.name}}, nil
}

var _ interface {
	nbd.Writer
	nbd.Capable
	nbd.BlockSizer
	nbd.Flusher
	nbd.Trimmer
	nbd.ZeroWriter
	nbd.MultiConner
	nbd.Revocable
} = (*device)(nil)

// device is the mirrored disk for one connection.
type device struct {
	disk *Disk
	told atomic.Int64 // of Disk.lost, what this client has been told
}

// Size implements [nbd.Device].
func (d *device) Size() int64 { return d.disk.target.Size() }

// Close implements [nbd.Device]. The mirror goes on.
func (d *device) Close() error { return nil }

// Lifetime implements [nbd.Revocable].
func (d *device) Lifetime() context.Context { return d.disk.ctx }

// BlockSizes implements [nbd.BlockSizer].
func (d *device) BlockSizes() (minimum, preferred, maxPayload uint32) {
	return uint32(d.disk.target.BlockSize()), 0, 0
}

// Capabilities implements [nbd.Capable].
func (d *device) Capabilities() wire.TransmissionFlags { return d.disk.flags }

// MultiConn implements [nbd.MultiConner]. All connections share the connections to the ends,
// so a flush on one covers the writes of all.
func (d *device) MultiConn() bool { return true }

// ReadAt implements [io.ReaderAt].
func (d *device) ReadAt(p []byte, off int64) (int, error) {
	return count(len(p), d.disk.target.ReadAt(d.disk.ctx, p, off))
}

// WriteAt implements [io.WriterAt].
func (d *device) WriteAt(p []byte, off int64) (int, error) {
	return count(len(p), d.disk.target.WriteAt(d.disk.ctx, p, off))
}

func count(n int, err error) (int, error) {
	if err != nil {
		return 0, err
	}
	return n, nil
}

// Trim implements [nbd.Trimmer].
func (d *device) Trim(off, n int64) error { return d.disk.target.Trim(d.disk.ctx, off, n) }

// zeroes is written where holes are not wanted.
var zeroes [1 << 20]byte

// WriteZeroes implements [nbd.ZeroWriter]. It is never fast, as it may go to two ends.
func (d *device) WriteZeroes(off, n int64, noHole, fast bool) error {
	switch {
	case fast:
		return wire.ENOTSUP
	case !noHole:
		return d.disk.target.WriteZeroes(d.disk.ctx, off, n)
	}
	for end := off + n; off < end; off += int64(len(zeroes)) {
		if err := d.disk.target.WriteAt(d.disk.ctx, zeroes[:min(int64(len(zeroes)), end-off)], off); err != nil {
			return err
		}
	}
	return nil
}

// Flush implements [nbd.Flusher]. After a loss of changes that were not flushed it fails once for
// each connection, while the mirror returns the error only once: what one client has not flushed
// may be missing although another one got the error.
func (d *device) Flush() error {
	err := d.disk.target.Flush(d.disk.ctx)
	if errors.Is(err, mirror.ErrLost) {
		d.disk.lost.Add(1)
	}
	if lost := d.disk.lost.Load(); d.told.Swap(lost) != lost && err == nil {
		err = mirror.ErrLost
	}
	return err
}
