// Package mirroring joins package mirror with its surroundings: the ends of a copy become the
// two devices of a mirror, and a mirror becomes a device of an NBD server.
package mirroring

import (
	"context"
	"errors"

	"xapi-nbd/cmd/nbd-tool/internal/copying"
	"xapi-nbd/mirror"
	"xapi-nbd/nbd/wire"
)

var _ interface {
	mirror.Device
	mirror.LossCounter
	mirror.Extenter
} = (*End)(nil)

// End is an end of a mirror. Its methods may be called concurrently, except for Close.
type End struct {
	copying.End
	slots chan struct{} // limits the requests in flight; nil is no limit
}

// The limits of tapdisk's server, which it does not announce: requests that are no multiples
// of a sector are rounded down, and 8 are in flight at most.
const (
	tapdiskUnit  = 512
	tapdiskSlots = 8
)

// NewEnd returns the end of a mirror for an end of a copy, which it closes.
func NewEnd(e copying.End) *End {
	end := &End{End: e}
	if end.Primitive() {
		end.slots = make(chan struct{}, tapdiskSlots)
	}
	return end
}

// Primitive reports whether the server offers reading and writing and nothing else, as
// tapdisk's does.
func (e *End) Primitive() bool {
	x, ok := e.End.(*copying.Export)
	return ok && x.Pool().Info().Flags&^wire.FlagSendDF == wire.FlagHasFlags
}

// BlockSize implements [mirror.Device].
func (e *End) BlockSize() int64 {
	if e.slots != nil {
		return max(e.Unit(), tapdiskUnit)
	}
	return e.Unit()
}

// ReadAt implements [mirror.Device].
func (e *End) ReadAt(ctx context.Context, p []byte, off int64) error {
	return e.limited(ctx, func() error { return e.End.ReadAt(ctx, p, off) })
}

// WriteAt implements [mirror.Device].
func (e *End) WriteAt(ctx context.Context, p []byte, off int64) error {
	return e.limited(ctx, func() error { return e.End.WriteAt(ctx, p, off) })
}

// WriteZeroes implements [mirror.Device].
func (e *End) WriteZeroes(ctx context.Context, off, n int64) error {
	return e.limited(ctx, func() error { return e.Zero(ctx, off, n) })
}

// limited calls do when there is room for another request.
func (e *End) limited(ctx context.Context, do func() error) error {
	if e.slots == nil {
		return do()
	}
	select {
	case e.slots <- struct{}{}:
		defer func() { <-e.slots }()
		return do()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Extents implements [mirror.Extenter].
func (e *End) Extents(ctx context.Context, off, n int64) ([]mirror.Extent, error) {
	ask := e.End.Extents()
	if ask == nil {
		return nil, errors.ErrUnsupported
	}
	found, err := ask(ctx, off, n)
	if err == nil && len(found) == 0 {
		err = errors.ErrUnsupported
	}
	if err != nil {
		return nil, err
	}
	var extents []mirror.Extent
	for _, x := range found {
		extents = append(extents, mirror.Extent{Length: int64(x.Length), Zero: x.Status&wire.StateZero != 0})
	}
	return extents, nil
}
