package main

import "context"

// plan cuts the source into tasks, in order and without gaps, each as one
// request can do it. Zero ones begin and end at multiples of the units of both
// ends; what that leaves over of a hole is data, which reads as zeroes too.
func (c *copier) plan(ctx context.Context, put func(task) error) error {
	size, unit := c.src.size(), max(grain, c.src.unit())
	dstUnit := int64(1)
	if c.dst != nil {
		dstUnit = c.dst.unit()
		unit = max(unit, dstUnit)
	}
	ask := c.src.extents()
	if ask == nil {
		return split(task{0, size, false}, put)
	}
	done := int64(0) // everything before it is put
	upTo := func(off int64, zero bool) error {
		if off <= done {
			return nil
		}
		t := task{done, off - done, zero}
		done = off
		return split(t, put)
	}
	err := walkExtents(ctx, size, ask, func(e extent) error {
		if !e.isZero() {
			return upTo(down(e.end(), unit), false)
		}
		begin, end := down(e.off+unit-1, unit), down(e.end(), unit)
		if e.end() == size && size%dstUnit == 0 {
			end = size
		}
		if end <= begin {
			return nil
		}
		if err := upTo(begin, false); err != nil {
			return err
		}
		return upTo(end, true)
	})
	if err != nil {
		return err
	}
	return upTo(size, false)
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
