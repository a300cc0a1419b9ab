package main

import (
	"context"

	"xapi-nbd/nbd/wire"
)

// taskKind is what has to be done for a range.
type taskKind int

const (
	copyData  taskKind = iota
	makeZero           // the source is known to read as zeroes
	leaveAsIs          // the destination has it already
)

// kindOf is the kind of an extent of base:allocation.
func kindOf(state uint64) taskKind {
	if state&wire.StateZero != 0 {
		return makeZero
	}
	return copyData
}

// plan cuts the source into tasks, in order, each as one request can do it; what is to
// be left as it is has no task. The other two kinds but data begin and end at multiples
// of the units of both ends: what that leaves over of them is copied, which is right for
// both.
func (c *copier) plan(ctx context.Context, put func(task) error) error {
	size, unit := c.src.size(), max(grain, c.src.unit())
	dstUnit := int64(1)
	if c.dst != nil {
		dstUnit = c.dst.unit()
		unit = max(unit, dstUnit)
	}
	ask, kindOf := c.src.extents(), kindOf
	if c.changes != nil {
		ask, kindOf = c.changes.ask, c.changes.kindOf
	}
	if ask == nil {
		return split(task{0, size, false}, put)
	}
	done := int64(0) // everything before it is put, or left as it is
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
	err := walkExtents(ctx, size, ask, func(e extent) error {
		kind := kindOf(e.state)
		if kind == copyData {
			return upTo(down(e.end(), unit), copyData)
		}
		begin, end := down(e.off+unit-1, unit), down(e.end(), unit)
		if e.end() == size && size%dstUnit == 0 {
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
	return upTo(size, copyData)
}

// dataBytes is how many bytes of the plan have to be read from the source: the rest
// costs next to nothing.
func (c *copier) dataBytes(ctx context.Context) (n int64, err error) {
	if c.src.extents() == nil && c.changes == nil {
		return c.src.size(), nil
	}
	err = c.plan(ctx, func(t task) error {
		if !t.zero {
			n += t.n
		}
		return nil
	})
	return n, err
}

// down rounds down to a multiple of unit, a power of two.
func down(v, unit int64) int64 { return v &^ (unit - 1) }

// split makes requests of a task.
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
