package blockdev

import (
	"bytes"
	"fmt"

	"golang.org/x/sys/unix"
)

// zeroUnit is the size in bytes of the ranges that WriteZeroes writes or leaves alone. Formats of
// thin disks allocate 64 KiB or more at a time.
const zeroUnit = 64 << 10

// zeroes is written, and compared with.
var zeroes [directBounce]byte

// WriteZeroes zeroes a range. With noHole all of it is written, so that it is allocated.
// Otherwise it reads the range, and writes zeroes only where there are none, so that a thin disk
// stays thin. With fast it fails with ENOTSUP and changes nothing. Else see WriteAt.
func (d *Device) WriteZeroes(off, n int64, noHole, fast bool) error {
	return d.change(off, n, func() error {
		if fast {
			return fmt.Errorf("no fast way to zero a range of %s: %w", d.path, unix.ENOTSUP)
		}
		s := d.lock(off, n)
		defer d.writer.locks.unlock(s)
		if noHole {
			return d.zeroAll(off, n)
		}
		return d.zeroData(off, n)
	})
}

// WriteZeroesFUA is WriteZeroes and Flush.
func (d *Device) WriteZeroesFUA(off, n int64, noHole, fast bool) error {
	if err := d.WriteZeroes(off, n, noHole, fast); err != nil {
		return err
	}
	return d.Flush()
}

// zeroAll zeroes a range, and allocates it. The caller holds its span.
func (d *Device) zeroAll(off, n int64) error {
	begin, end := d.blocksIn(off, n)
	if begin >= end {
		return d.writeZeroes(off, off+n)
	}
	err := d.modify("zero", func() error { return d.io.zero(begin, end-begin) })
	if unsupported(err) {
		return d.writeZeroes(off, off+n)
	}
	if err == nil {
		err = d.writeZeroes(off, begin)
	}
	if err == nil {
		err = d.writeZeroes(end, off+n)
	}
	return err
}

// writeZeroes writes zeroes from begin to end.
func (d *Device) writeZeroes(begin, end int64) error {
	for begin < end {
		n := min(end-begin, int64(len(zeroes)))
		if err := d.writeThroughBuffer(zeroes[:n], begin, false); err != nil {
			return err
		}
		begin += n
	}
	return nil
}

// zeroData writes zeroes to the parts of a range that have other bytes. The caller holds its
// span.
func (d *Device) zeroData(off, n int64) error {
	b := directBuffers.Get().(*[]byte)
	defer directBuffers.Put(b)
	for end := off + n; off < end; {
		size := int64(len(*b))
		next := min(end, off&^(size-1)+size)
		begin, _ := d.blocksOf(off, 0)
		blocks := d.whole(*b, int(next-begin))
		if err := d.preadFull(blocks, begin); err != nil {
			return err
		}
		if err := d.zeroIn(blocks, begin, off, next); err != nil {
			return err
		}
		off = next
	}
	return nil
}

// zeroIn zeroes the bytes between from and to in the blocks at off, which have been read, and
// writes the units that had other bytes.
func (d *Device) zeroIn(blocks []byte, off, from, to int64) error {
	for from < to {
		next := min(to, from&^(zeroUnit-1)+zeroUnit)
		part := blocks[from-off : next-off]
		if !bytes.Equal(part, zeroes[:len(part)]) {
			clear(part)
			begin, end := d.blocksOf(from, next-from)
			if err := d.pwrite(blocks[begin-off:end-off], begin, false); err != nil {
				return err
			}
		}
		from = next
	}
	return nil
}
