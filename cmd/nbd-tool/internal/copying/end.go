package copying

import (
	"context"

	"xapi-nbd/cmd/nbd-tool/internal/extents"
)

// An End is one side of a copy. Its methods may be called concurrently, except for Close.
type End interface {
	// Name returns the name for messages.
	Name() string
	// Size returns the size in bytes.
	Size() int64
	// Unit returns the power of two of which offsets and lengths of requests must be
	// multiples, except at the end of the source.
	Unit() int64
	// Lanes returns the number of connections.
	Lanes() int
	// Extents returns a function that asks for base:allocation, or nil if the state is
	// not known.
	Extents() extents.Asker
	// Losses returns a number that changes when writes that were not flushed may have
	// been lost: see client.Pool.Changes.
	Losses() int64

	ReadAt(ctx context.Context, p []byte, off int64) error
	WriteAt(ctx context.Context, p []byte, off int64) error
	// Zero makes n bytes from off on read as zeroes.
	Zero(ctx context.Context, off, n int64) error
	// Trim tells the end that the content of n bytes from off on is not needed any more. It
	// does nothing if CanTrim returns false.
	Trim(ctx context.Context, off, n int64) error
	CanTrim() bool
	// Flush makes all writes durable that have returned before. It does nothing if CanFlush
	// returns false.
	Flush(ctx context.Context) error
	CanFlush() bool
	Close() error
}

// checker is an [End] that may have changed in a way that makes a copy incomplete.
type checker interface {
	// Check returns an error if that is so. It is called after the last request of a copy.
	Check() error
}

// check calls Check of the ends that have it.
func check(ends ...End) error {
	for _, e := range ends {
		if c, ok := e.(checker); ok {
			if err := c.Check(); err != nil {
				return err
			}
		}
	}
	return nil
}
