package main

import (
	"context"

	"xapi-nbd/nbd/wire"
)

// maxAsk is the longest range of one request for block status. It fits into the 32 bits of
// compact requests and is a multiple of every minimum block size.
const maxAsk = 1 << 31

// extent is a run of bytes with one state of base:allocation.
type extent struct {
	off, n int64
	state  uint64
}

// end returns the offset behind the extent.
func (e extent) end() int64 { return e.off + e.n }

// isZero reports whether the bytes read as zeroes, which a hole without that flag need not.
func (e extent) isZero() bool { return e.state&wire.StateZero != 0 }

// kind returns the state as text, in the words of other NBD tools.
func (e extent) kind() string {
	switch e.state & (wire.StateHole | wire.StateZero) {
	case wire.StateHole | wire.StateZero:
		return "hole,zero"
	case wire.StateHole:
		return "hole"
	case wire.StateZero:
		return "zero"
	}
	return "data"
}

// asker returns the extents from off on, at least one, perhaps not up to off+n.
type asker func(ctx context.Context, off, n int64) ([]wire.Extent, error)

// walkExtents calls fn for the extents of [0, size), in order and without gaps. It joins
// neighbours with the same state.
func walkExtents(ctx context.Context, size int64, ask asker, fn func(extent) error) error {
	var pending extent
	for off := int64(0); off < size; {
		n := min(size-off, maxAsk)
		answer, err := ask(ctx, off, n)
		if err != nil {
			return err
		}
		if len(answer) == 0 || answer[0].Length == 0 {
			answer = []wire.Extent{{Length: uint64(n)}} // unknown, so it may be data
		}
		for _, a := range answer {
			length := int64(min(a.Length, uint64(size-off))) // the last may be longer than asked
			if length <= 0 {
				continue
			}
			if a.Status == pending.state {
				pending.n += length
			} else {
				if err := emit(pending, fn); err != nil {
					return err
				}
				pending = extent{off, length, a.Status}
			}
			off += length
		}
	}
	return emit(pending, fn)
}

func emit(e extent, fn func(extent) error) error {
	if e.n == 0 {
		return nil
	}
	return fn(e)
}
