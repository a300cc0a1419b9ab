package copying

import (
	"context"

	"xapi-nbd/cmd/nbd-tool/internal/extents"
	"xapi-nbd/nbd/wire"
)

// task is a range of the source and the work for it. Ranges of zeroes need not be read.
type task struct {
	off, n int64
	zero   bool
}

// taskKind is the kind of work for a range.
type taskKind int

const (
	copyData  taskKind = iota
	makeZero           // the source is known to read as zeroes
	leaveAsIs          // the destination has it already
)

// kindOf returns the kind of work for an extent of base:allocation.
func kindOf(state uint64) taskKind {
	if state&wire.StateZero != 0 {
		return makeZero
	}
	return copyData
}

// plan cuts [from, to) of the source into tasks in order, each of at most one request. Ranges
// that are left as they are have no task. from and to are ends of tasks of an earlier plan,
// or the ends of the source. Ranges of all kinds but data begin and end at multiples of the
// units of both ends; the rest of them is copied as data, which gives the same content.
func (c *Copier) plan(ctx context.Context, from, to int64, put func(task) error) error {
	size, unit := c.src.Size(), max(grain, c.src.Unit())
	dstUnit := int64(1)
	if c.dst != nil {
		dstUnit = c.dst.Unit()
		unit = max(unit, dstUnit)
	}
	ask, kindOf := c.src.Extents(), kindOf
	if c.opts.Changes != nil {
		ask, kindOf = c.opts.Changes.ask, c.opts.Changes.kindOf
	}
	if ask == nil {
		return split(task{from, to - from, false}, put)
	}
	done := from // everything before this offset is planned
	upTo := func(off int64, kind taskKind) error {
		if off <= done {
			return nil
		}
		t := task{done, off - done, kind == makeZero}
		done = off
		if kind == leaveAsIs {
			return nil
		}
		return split(t, put)
	}
	err := extents.Walk(ctx, from, to, ask, func(e extents.Extent) error {
		kind := kindOf(e.State)
		if kind == copyData {
			return upTo(down(e.End(), unit), copyData)
		}
		begin, end := down(e.Off+unit-1, unit), down(e.End(), unit)
		if e.End() == size && size%dstUnit == 0 {
			end = size
		}
		if end <= begin {
			return nil
		}
		if err := upTo(begin, copyData); err != nil {
			return err
		}
		return upTo(end, kind)
	})
	if err != nil {
		return err
	}
	return upTo(to, copyData)
}

// DataBytes returns the number of bytes that have to be read from the source, which take
// nearly all of the time, from Options.From on.
func (c *Copier) DataBytes(ctx context.Context) (n int64, err error) {
	if c.src.Extents() == nil && c.opts.Changes == nil {
		return c.src.Size() - c.opts.From, nil
	}
	err = c.plan(ctx, c.opts.From, c.src.Size(), func(t task) error {
		if !t.zero {
			n += t.n
		}
		return nil
	})
	return n, err
}

// VerifyBytes returns the number of bytes that Verify compares.
func (c *Copier) VerifyBytes(ctx context.Context) (n int64, err error) {
	err = c.compared(ctx, func(t task) error { n += t.n; return nil })
	return n, err
}

// down rounds down to a multiple of unit, a power of two.
func down(v, unit int64) int64 { return v &^ (unit - 1) }

// split cuts a task into the ranges of single requests.
func split(t task, put func(task) error) error {
	step := int64(chunkSize)
	if t.zero {
		step = zeroSize
	}
	for ; t.n > 0; t.off, t.n = t.off+step, t.n-step {
		if err := put(task{t.off, min(step, t.n), t.zero}); err != nil {
			return err
		}
	}
	return nil
}
