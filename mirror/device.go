package mirror

import (
	"context"
	"iter"
	"log/slog"
	"time"
)

// Device is one end of a mirror: a disk of a fixed size. Its methods are called
// concurrently, for ranges inside [0, Size) whose offsets and lengths are multiples of
// BlockSize, except that the last block may be short if Size is no multiple of it. The
// caller of [New] closes its devices, after [Mirror.Run] has returned and the last client
// has left.
//
// When a method returns, its operation has ended: nothing of it may be carried out later. If
// WriteAt, WriteZeroes or Trim returns an error, each byte of the range may have the old or
// the new content. After Trim each byte of the range may have any content, but must not change
// until it is written.
type Device interface {
	// Size returns the size in bytes.
	Size() int64
	// BlockSize returns the smallest range that can be read or written, a power of two
	// up to 65536.
	BlockSize() int64
	// ReadAt fills p with the bytes at off.
	ReadAt(ctx context.Context, p []byte, off int64) error
	// WriteAt writes p at off. It must not modify p or keep it.
	WriteAt(ctx context.Context, p []byte, off int64) error
	// WriteZeroes makes n bytes at off read as zeroes. It may make a hole.
	WriteZeroes(ctx context.Context, off, n int64) error
	// Trim frees the storage of n bytes at off.
	Trim(ctx context.Context, off, n int64) error
	// Flush puts all changes on stable storage whose methods have returned before.
	Flush(ctx context.Context) error
}

// LossCounter is a [Device] that may lose changes that were not flushed, and go on: one
// behind a network connection, for example, which is made again when it is lost.
//
// Losses returns a number that changes whenever changes may have been lost that were not
// flushed before. It must have changed before the first method returns whose operation was
// carried out after the loss. It must return at once, and must not call the mirror.
// Package client of this module has such a number: client.Pool.Changes.
type LossCounter interface {
	Losses() int64
}

// Extenter is a [Device] that can tell which ranges read as zeroes. The mirror asks the
// primary before it copies, and does not read these.
//
// Extents describes the range that begins at off. The first extent begins at off, each other
// one where the one before it ends. They may end before or after off+n. With an error the
// whole range counts as data.
type Extenter interface {
	Extents(ctx context.Context, off, n int64) ([]Extent, error)
}

// Extent is a part of a device.
type Extent struct {
	Length int64 // in bytes, above 0
	Zero   bool  // all of it reads as zeroes
}

// ReadOnlyDevice is a [Device] that may not be writable. [New] refuses a secondary whose
// ReadOnly returns true.
type ReadOnlyDevice interface {
	ReadOnly() bool
}

// Intent is a write-intent log. It records on stable storage which regions of the disk may
// differ between the two ends, so that after a crash only these need be copied: see
// [Config.Dirty]. Its methods are called concurrently, and never while the mirror holds a
// lock.
type Intent interface {
	// Mark returns when it is on stable storage that the ends may differ in the range.
	// The mirror calls it before each change of the primary by a client. If it returns an
	// error the change is not made, and the client gets the error.
	Mark(ctx context.Context, off, n int64) error
	// Done ends a Mark that has returned nil: the change has ended at the primary. Until
	// the ends are equal again in the range, clean (see Clear) returns false for it.
	Done(off, n int64)
	// Clear is called when both ends have been flushed; began is the time before these
	// flushes. It may clear the bits of regions for which no Mark is without its Done, whose
	// last Done was before began, and for which clean returns true: in that range nothing
	// is dirty, in flight, or not flushed yet.
	Clear(ctx context.Context, began time.Time, clean func(off, n int64) bool) error
	// Complete is called when both ends are equal and flushed and no client can write
	// to them, before the mirror ends: the log cannot be used any more. If it returns an
	// error the mirror goes on.
	Complete(ctx context.Context, pivot bool) error
}

// OnError is what a mirror does if it cannot copy.
type OnError int

const (
	// Detach goes on without the secondary: clients use the primary as if there were no
	// mirror.
	Detach OnError = iota
	// Stop makes all changes by clients fail with [ErrFailed].
	Stop
)

// Config is the configuration of a [Mirror]. Primary and Secondary are required.
type Config struct {
	// Primary is the disk that clients use. Secondary becomes equal to it. Their sizes
	// must be equal, and one block size must divide the other. Nobody else may change
	// them.
	Primary, Secondary Device

	// SecondaryIsZero says that all of the secondary reads as zeroes, on stable storage, so
	// that zeroes need not be written. It must be false if an earlier mirror has written to
	// the secondary.
	SecondaryIsZero bool

	// Dirty yields the ranges, as offset and length in bytes, that may differ when the
	// mirror begins. All others must be equal and on stable storage at both ends. Nil means
	// that everything may differ.
	Dirty iter.Seq2[int64, int64]

	// Intent is the write-intent log; nil means none.
	Intent Intent

	// OnError is what happens if copying has failed for RetryFor. RetryFor 0 means one
	// minute. Until then it is repeated, with growing pauses.
	OnError  OnError
	RetryFor time.Duration

	// Stall is how long a client's change waits for the secondary at most. 0 means 2 s.
	Stall time.Duration

	// MaxHold is how long [Mirror.Complete] may hold clients' changes before it fails,
	// not counting the comparison of the ends. 0 means 30 s.
	MaxHold time.Duration

	// Requests is how many ranges of up to 1 MiB are copied at the same time. 0 means 16.
	// While clients read or change the disk it is an eighth of it. In the first pass over the
	// disk, if a copy takes less than 20 ms, it is one, and none for as long after it, so that
	// most requests meet no copy.
	Requests int

	// Rate limits the data that are copied, in bytes per second; zeroes and clients'
	// changes do not count. 0 means no limit.
	Rate int64

	// Log gets the events of the mirror. Nil means no log.
	Log *slog.Logger

	// granule is the granularity in bytes, 0 means 64 KiB, and copySize how much one copy
	// covers at most, 0 means 1 MiB. Tests make them smaller.
	granule, copySize int64
}
