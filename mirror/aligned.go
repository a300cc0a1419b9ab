package mirror

import "context"

// aligned is a Device for requests at any byte. It reads the rest of the blocks that a change
// covers in part, and writes whole blocks. Changes that overlap, or that cover parts of the
// same block, must not be made at the same time, except that aligned itself serializes those
// that need to read.
type aligned struct {
	Device
	edges chan struct{} // full while the rest of a block is read and written back
}

func newAligned(d Device) *aligned { return &aligned{d, make(chan struct{}, 1)} }

// widen returns the blocks that a range covers. whole is whether it covers no part of a block
// only.
func (d *aligned) widen(off, n int64) (begin, end int64, whole bool) {
	begin, end = alignedRange(off, n, d.BlockSize(), d.Size())
	return begin, end, begin == off && end == off+n
}

// alignedRange returns the blocks that a range covers.
func alignedRange(off, n, block, size int64) (begin, end int64) {
	return off / block * block, min((off+n+block-1)/block*block, size)
}

// narrow returns the whole blocks inside a range, and the end of the range.
func (d *aligned) narrow(off, n int64) (begin, end, behind int64) {
	block, behind := d.BlockSize(), off+n
	begin, end = (off+block-1)/block*block, behind/block*block
	if behind == d.Size() {
		end = behind
	}
	return begin, end, behind
}

// ReadAt implements [Device].
func (d *aligned) ReadAt(ctx context.Context, p []byte, off int64) error {
	begin, end, whole := d.widen(off, int64(len(p)))
	if whole {
		return d.Device.ReadAt(ctx, p, off)
	}
	blocks := make([]byte, end-begin)
	if err := d.Device.ReadAt(ctx, blocks, begin); err != nil {
		return err
	}
	copy(p, blocks[off-begin:])
	return nil
}

// WriteAt implements [Device].
func (d *aligned) WriteAt(ctx context.Context, p []byte, off int64) error {
	begin, end, whole := d.widen(off, int64(len(p)))
	if whole {
		return d.Device.WriteAt(ctx, p, off)
	}
	d.edges <- struct{}{}
	defer func() { <-d.edges }()
	blocks := make([]byte, end-begin)
	if err := d.Device.ReadAt(ctx, blocks, begin); err != nil {
		return err
	}
	copy(blocks[off-begin:], p)
	return d.Device.WriteAt(ctx, blocks, begin)
}

// WriteZeroes implements [Device].
func (d *aligned) WriteZeroes(ctx context.Context, off, n int64) error {
	begin, end, behind := d.narrow(off, n)
	if begin >= end {
		return d.WriteAt(ctx, make([]byte, n), off)
	}
	if begin > off {
		if err := d.WriteAt(ctx, make([]byte, begin-off), off); err != nil {
			return err
		}
	}
	if behind > end {
		if err := d.WriteAt(ctx, make([]byte, behind-end), end); err != nil {
			return err
		}
	}
	return d.Device.WriteZeroes(ctx, begin, end-begin)
}

// Trim implements [Device]. It leaves parts of blocks alone.
func (d *aligned) Trim(ctx context.Context, off, n int64) error {
	begin, end, _ := d.narrow(off, n)
	if begin >= end {
		return nil
	}
	return d.Device.Trim(ctx, begin, end-begin)
}
