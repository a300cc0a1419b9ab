// Package extents iterates over the status of an export or a file in a metadata context.
package extents

import (
	"context"

	"xapi-nbd/nbd/wire"
)

// maxAsk is the longest range of one request for block status. It fits into the 32 bits of
// compact requests and is a multiple of every minimum block size.
const maxAsk = 1 << 31

// Extent is a run of bytes with one state in a metadata context.
type Extent struct {
	Off, N int64
	State  uint64
}

// End returns the offset behind the extent.
func (e Extent) End() int64 { return e.Off + e.N }

// IsZero reports whether the state in base:allocation says that the bytes read as zeroes,
// which a hole without that flag need not.
func (e Extent) IsZero() bool { return e.State&wire.StateZero != 0 }

// Kind returns the state in base:allocation as text, in the words of other NBD tools.
func (e Extent) Kind() string {
	switch e.State & (wire.StateHole | wire.StateZero) {
	case wire.StateHole | wire.StateZero:
		return "hole,zero"
	case wire.StateHole:
		return "hole"
	case wire.StateZero:
		return "zero"
	}
	return "data"
}

// Asker returns the extents from off on, at least one, perhaps not up to off+n; or none if
// the state is not known.
type Asker func(ctx context.Context, off, n int64) ([]wire.Extent, error)

// Walk calls fn for the extents of [from, to), in order and without gaps. It joins
// neighbours with the same state. The state of a range that is not known is 0.
func Walk(ctx context.Context, from, to int64, ask Asker, fn func(Extent) error) error {
	pending := Extent{Off: from}
	for off := from; off < to; {
		n := min(to-off, maxAsk)
		answer, err := ask(ctx, off, n)
		if err != nil {
			return err
		}
		if len(answer) == 0 || answer[0].Length == 0 {
			answer = []wire.Extent{{Length: uint64(n)}}
		}
		for _, a := range answer {
			length := int64(min(a.Length, uint64(to-off))) // the last may be longer than asked
			if length <= 0 {
				continue
			}
			if a.Status == pending.State {
				pending.N += length
			} else {
				if err := emit(pending, fn); err != nil {
					return err
				}
				pending = Extent{off, length, a.Status}
			}
			off += length
		}
	}
	return emit(pending, fn)
}

func emit(e Extent, fn func(Extent) error) error {
	if e.N == 0 {
		return nil
	}
	return fn(e)
}
