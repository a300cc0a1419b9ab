package main

import (
	"context"

	"xapi-nbd/nbd/wire"
)

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

// plan cuts the source into tasks in order, each of at most one request. Ranges that are
// left as they are have no task. Ranges of all kinds but data begin and end at multiples of
// the units of both ends; the rest of them is copied as data, which gives the same content.
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
	done := int64(0) // everything before this offset is planned
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

// dataBytes returns the number of bytes of the plan that have to be read from the source,
// which take nearly all of the time.
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
