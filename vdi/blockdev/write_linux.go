package blockdev

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"xapi-nbd/internal/flush"
)

// writer is the part of a Device that was opened for writing.
type writer struct {
	block   int64 // smallest unit of a write, in bytes: a power of 2; 1 through the page cache
	canTrim bool
	locks   *spanLocks
	flushes *flush.Group
}

// prepareWriting finds out how the open device can be written.
func (d *Device) prepareWriting(roots Roots) error {
	d.writer = &writer{block: int64(d.minBlock), canTrim: true, locks: newSpanLocks(), flushes: flush.NewGroup()}
	fd := int(d.f.Fd())
	if !d.isFile() {
		ro, err := unix.IoctlGetUint32(fd, unix.BLKROGET)
		if err != nil {
			return os.NewSyscallError("ioctl BLKROGET", err)
		}
		if ro != 0 {
			return unix.EROFS
		}
		d.writer.canTrim = canDiscard(uint64(d.node.Rdev), roots)
		return nil
	}
	if d.direct {
		if d.writer.block = directBlock(fd); d.size%d.writer.block == 0 {
			return nil
		}
		// The last block is not whole, and writing all of it would make the file longer.
		flags, err := unix.FcntlInt(d.f.Fd(), unix.F_GETFL, 0)
		if err == nil {
			_, err = unix.FcntlInt(d.f.Fd(), unix.F_SETFL, flags&^unix.O_DIRECT)
		}
		if err != nil {
			return os.NewSyscallError("fcntl", err)
		}
	}
	d.direct, d.writer.block = false, 1
	return nil
}

// directBlock returns the unit of direct writes to a regular file, in bytes.
func directBlock(fd int) int64 {
	var st unix.Statx_t
	err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st)
	if err != nil || st.Mask&unix.STATX_DIOALIGN == 0 || st.Dio_offset_align == 0 {
		return directUnit // of older kernels, and of file systems that do not tell
	}
	return int64(max(st.Dio_offset_align, st.Dio_mem_align, fileSector))
}

// canDiscard reports whether a block device can free storage.
func canDiscard(dev uint64, roots Roots) bool {
	of := fmt.Sprintf("%s/dev/block/%d:%d/", roots.Sys, unix.Major(dev), unix.Minor(dev))
	for _, queue := range []string{"queue", "../queue"} { // the second one of a partition
		text, err := os.ReadFile(of + queue + "/discard_max_bytes")
		if err == nil {
			return strings.TrimSpace(string(text)) != "0"
		}
	}
	return false
}

// CanTrim reports whether Trim can free storage.
func (d *Device) CanTrim() bool { return d.writer != nil && d.writer.canTrim }

// MultiConn reports whether a read returns the data of every earlier write of any connection,
// and Flush covers the writes of all connections. It does, because all use one open device.
func (d *Device) MultiConn() bool { return true }

// WriteAt implements io.WriterAt. The range must be inside [0, Size), else it fails with
// EINVAL. After an error any part of the range may have been written, and nothing else.
//
// WriteAt and the other methods that change the device check its binding before each system
// call that writes, and at the end: an error that matches [ErrReplaced] means that the last of
// these calls may have changed another disk. They fail with EBADF if the device was opened for
// reading.
func (d *Device) WriteAt(p []byte, off int64) (int, error) {
	if err := d.write(p, off, false); err != nil {
		return 0, err
	}
	return len(p), nil
}

// WriteFUA is WriteAt, and returns when the bytes are on stable storage as far as the device
// has that, see the documentation of the package.
func (d *Device) WriteFUA(p []byte, off int64) error { return d.write(p, off, true) }

func (d *Device) write(p []byte, off int64, durable bool) error {
	return d.change(off, int64(len(p)), func() error {
		s := d.lock(off, int64(len(p)))
		defer d.writer.locks.unlock(s)
		if d.isWhole(off, int64(len(p))) && isAligned(p, int(d.writer.block)) {
			err := d.pwrite(p, off, durable)
			if !errors.Is(err, unix.EINVAL) {
				return err
			}
			// The device needs a larger alignment of memory than its sector size.
		}
		return d.writeThroughBuffer(p, off, durable)
	})
}

// change calls do, which changes n bytes at off.
func (d *Device) change(off, n int64, do func() error) error {
	switch {
	case d.writer == nil:
		return &os.PathError{Op: "write", Path: d.path, Err: unix.EBADF}
	case off < 0 || n < 0 || n > d.size || off > d.size-n:
		return fmt.Errorf("%d bytes at %d of %s, which has %d: %w", n, off, d.path, d.size, unix.EINVAL)
	case n == 0:
		return nil
	}
	err := do()
	if lost := d.CheckBinding(); lost != nil {
		return lost
	}
	return err
}

// blocksOf returns the range of the blocks that a range touches.
func (d *Device) blocksOf(off, n int64) (begin, end int64) {
	unit := d.writer.block
	return off &^ (unit - 1), (off + n + unit - 1) &^ (unit - 1)
}

// isWhole reports whether a range consists of whole blocks.
func (d *Device) isWhole(off, n int64) bool {
	begin, end := d.blocksOf(off, n)
	return begin == off && end == off+n
}

// lock holds the blocks that a range touches, until the caller calls unlock. Through the page
// cache it holds all of the device, so that there is one write at a time: the kernel reports an
// error of the storage once, to any of several.
func (d *Device) lock(off, n int64) span {
	s := span{alone: !d.isWhole(off, n)}
	if s.begin, s.end = d.blocksOf(off, n); !d.direct {
		s = span{end: d.size, alone: true}
	}
	d.writer.locks.lock(s)
	return s
}

// writeThroughBuffer writes p in aligned memory, with the bytes around it that complete its
// first and its last block. The caller holds the span.
func (d *Device) writeThroughBuffer(p []byte, off int64, durable bool) error {
	b := directBuffers.Get().(*[]byte)
	defer directBuffers.Put(b)
	for len(p) > 0 {
		begin, _ := d.blocksOf(off, 0)
		skip := int(off - begin)
		n := min(len(p), len(*b)-skip)
		blocks := d.whole(*b, skip+n)
		if err := d.readEdges(blocks, begin, skip, skip+n); err != nil {
			return err
		}
		copy(blocks[skip:], p[:n])
		if err := d.pwrite(blocks, begin, durable); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// whole returns the part of b that has the n first bytes and ends with a block.
func (d *Device) whole(b []byte, n int) []byte {
	unit := int(d.writer.block)
	return b[:(n+unit-1)&^(unit-1)]
}

// readEdges reads the first and the last block of blocks, which are at off, unless they are
// wholly between from and to.
func (d *Device) readEdges(blocks []byte, off int64, from, to int) error {
	unit := int(d.writer.block)
	last := len(blocks) - unit
	if from > 0 || last == 0 && to < len(blocks) {
		if err := d.preadFull(blocks[:unit], off); err != nil {
			return err
		}
	}
	if last > 0 && to < len(blocks) {
		return d.preadFull(blocks[last:], off+int64(last))
	}
	return nil
}

// preadFull reads all of p.
func (d *Device) preadFull(p []byte, off int64) error {
	for len(p) > 0 {
		n, err := d.pread(p, off)
		if err != nil {
			if errors.Is(err, io.EOF) { // the device has become shorter
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// pwrite writes all of p, which consists of whole blocks.
func (d *Device) pwrite(p []byte, off int64, durable bool) error {
	durable = durable || !d.direct
	for len(p) > 0 {
		var n int
		err := d.modify("write", func() (err error) {
			n, err = d.io.pwrite(p, off, durable)
			return err
		})
		if err != nil {
			return err
		}
		if n <= 0 {
			return &os.PathError{Op: "write", Path: d.path, Err: io.ErrShortWrite}
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// modify is call for a system call that changes the content. Before each attempt
// Options.MayChange is asked: a request can take long before its system call is made, if it waits
// for another one in the same block or consists of many calls.
func (d *Device) modify(op string, do func() error) error {
	for {
		if d.mayChange != nil {
			if err := d.mayChange(); err != nil {
				return err
			}
		}
		if err := d.callOnce(op, do); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// call makes a system call, after a check of the binding, until it is not interrupted by a
// signal; Go's scheduler sends signals.
func (d *Device) call(op string, do func() error) error {
	for {
		if err := d.callOnce(op, do); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// callOnce makes a system call once, after a check of the binding.
func (d *Device) callOnce(op string, do func() error) error {
	if err := d.CheckBinding(); err != nil {
		return err
	}
	if err := do(); err != nil {
		return &os.PathError{Op: op, Path: d.path, Err: err}
	}
	return nil
}

// Flush returns when all changes whose calls had returned before are on stable storage, as far
// as the device has that, see the documentation of the package. After it has failed once it
// always fails: the kernel reports lost changes only once.
func (d *Device) Flush() error {
	if d.writer == nil {
		return &os.PathError{Op: "flush", Path: d.path, Err: unix.EBADF}
	}
	return d.writer.flushes.Flush(func() error {
		if !d.direct { // the error of a write through the page cache is for that write
			s := d.lock(0, d.size)
			defer d.writer.locks.unlock(s)
		}
		err := d.call("flush", d.io.sync)
		if lost := d.CheckBinding(); lost != nil {
			return lost
		}
		return err
	})
}

// Trim frees the storage of the whole blocks in a range, if CanTrim. The content of the range is
// undefined afterwards. It does nothing if the driver turns out to be unable.
func (d *Device) Trim(off, n int64) error {
	return d.change(off, n, func() error {
		begin, end := d.blocksIn(off, n)
		if begin >= end || !d.writer.canTrim {
			return nil
		}
		s := d.lock(begin, end-begin)
		defer d.writer.locks.unlock(s)
		err := d.modify("discard", func() error { return d.io.discard(begin, end-begin) })
		if unsupported(err) {
			return nil
		}
		return err
	})
}

// TrimFUA is Trim and Flush.
func (d *Device) TrimFUA(off, n int64) error {
	if err := d.Trim(off, n); err != nil {
		return err
	}
	return d.Flush()
}

// blocksIn returns the range of the whole blocks, or whole sectors of a file, in a range. It is
// empty if begin is not below end.
func (d *Device) blocksIn(off, n int64) (begin, end int64) {
	unit := max(d.writer.block, fileSector)
	return (off + unit - 1) &^ (unit - 1), (off + n) &^ (unit - 1)
}
