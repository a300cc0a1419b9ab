package nbdtest

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"sync"
	"syscall"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/wire"
)

// capabilities checks the optional interfaces.
func (c *deviceTest) capabilities(open func() nbd.Device) {
	c.t.Helper()
	c.extents("at first")
	c.cache()
	w, ok := c.d.(io.WriterAt)
	if !ok || readOnlyExport(c.d) {
		return
	}
	// region.data is the content that the device must have, so it changes too.
	before := make([][]byte, len(c.regions))
	for i, r := range c.regions {
		before[i] = slices.Clone(r.data)
	}
	c.w = w
	for _, check := range []func(){c.writeEmpty, c.writeOffsets, c.writeConcurrently, c.writePastEnd, c.zero, c.trim} {
		check()
		c.flush()
		c.extents("after changes")
		c.expectAll("after changes")
	}
	c.coherent(open)
	for i, r := range c.regions {
		c.write("first content", r.off, before[i])
	}
	c.flush()
	c.expectAll("first content written back")
}

// readOnlyExport reports whether the device is a client's connection to a read-only export.
// Such a connection has a WriteAt method nevertheless.
func readOnlyExport(d nbd.Device) bool {
	i, ok := d.(interface{ Info() wire.ExportInfo })
	return ok && i.Info().Flags&wire.FlagReadOnly != 0
}

// allNoise is computed once, because that is slow with the race detector.
var allNoise = sync.OnceValue(func() []byte { return Bytes(wholeLimit, 0, 1) })

// noise returns n bytes, almost none of which are zero, that depend on the seed.
func noise(n int, seed uint64) []byte {
	all := allNoise()
	shift := int(seed * 1009 % uint64(len(all)/4))
	return all[shift : shift+n]
}

// write writes p, which is inside a region, and updates the region.
func (c *deviceTest) write(what string, off int64, p []byte) {
	c.t.Helper()
	if n, err := c.w.WriteAt(p, off); n != len(p) || err != nil {
		c.t.Errorf("%s: write of %d bytes at %d: got %d and error %v, want all", what, len(p), off, n, err)
	}
	copy(c.known(off, len(p)), p)
}

func (c *deviceTest) expectAll(what string) {
	c.t.Helper()
	for _, r := range c.regions {
		c.expect(what, r.off, len(r.data))
	}
}

// around reads a range and some of its neighbours.
func (c *deviceTest) around(what string, r region, at, n int) {
	c.t.Helper()
	begin, end := max(at-5000, 0), min(at+n+5000, len(r.data))
	c.expect(what, r.off+int64(begin), end-begin)
}

func (c *deviceTest) flush() {
	c.t.Helper()
	if f, ok := c.d.(nbd.Flusher); ok {
		if err := f.Flush(); err != nil {
			c.t.Errorf("Flush: got error %v, want none", err)
		}
	}
}

// writeEmpty writes 0 bytes at several offsets.
func (c *deviceTest) writeEmpty() {
	c.t.Helper()
	for _, off := range []int64{0, c.size / 2, c.size} {
		if n, err := c.w.WriteAt(nil, off); n != 0 || err != nil {
			c.t.Errorf("write of nothing at %d: got %d and error %v, want 0 and none", off, n, err)
		}
	}
}

// ranges calls f for ranges around the boundaries to which a device might round, and for a
// large one. Before each call it writes other content there.
func (c *deviceTest) ranges(lengths []int, f func(r region, at, n int)) {
	c.t.Helper()
	seed := uint64(1000)
	for _, r := range c.regions {
		if half := len(r.data) / 2; half > 1<<20 {
			c.write("large", r.off, noise(half, seed))
			f(r, 1, half-2)
		}
		for _, edge := range []int{0, 512, 4096, 65536, len(r.data) / 2, len(r.data)} {
			for _, n := range lengths {
				for _, at := range []int{edge - n, edge - n/2, edge, edge + 1} {
					if at < 0 || at+n > len(r.data) {
						continue
					}
					seed++
					begin, end := max(at-600, 0), min(at+n+600, len(r.data))
					c.write("unaligned", r.off+int64(begin), noise(end-begin, seed))
					f(r, at, n)
				}
			}
		}
	}
}

// writeOffsets writes and reads back.
func (c *deviceTest) writeOffsets() {
	c.t.Helper()
	c.ranges([]int{1, 511, 512, 513, 4097, 70000}, func(r region, at, n int) {
		c.write("unaligned", r.off+int64(at), noise(n, 1))
		c.around("written", r, at, n)
	})
}

// writeConcurrently writes to adjacent ranges from several goroutines.
func (c *deviceTest) writeConcurrently() {
	c.t.Helper()
	const writers = 8
	r := c.regions[0]
	var wg sync.WaitGroup
	for i := range writers {
		// Adjacent stripes have blocks in common, and so have the writes in each.
		begin, end := len(r.data)*i/writers, len(r.data)*(i+1)/writers
		wg.Go(func() {
			for round := range uint64(3) {
				step := 300 + 4099*int(round)
				// More small pieces of a large stripe would check nothing new.
				for at := begin; at < min(end, begin+64*step); at += step {
					n := min(step, end-at)
					c.write("concurrent", r.off+int64(at), noise(n, 10*uint64(i)+round))
				}
			}
		})
	}
	wg.Wait()
}

// writePastEnd writes across and after the end, which must fail and not change the size.
func (c *deviceTest) writePastEnd() {
	c.t.Helper()
	last := c.regions[len(c.regions)-1]
	for _, inside := range []int{0, 1, 512} {
		if inside > len(last.data) {
			continue
		}
		off := c.size - int64(inside)
		if n, err := c.w.WriteAt(make([]byte, inside+100), off); err == nil {
			c.t.Errorf("write of %d bytes, %d before the end: got %d and no error", inside+100, inside, n)
		}
		// A part may have been written.
		c.write("at the end", off, noise(inside, 3))
	}
	if got := c.d.Size(); got != c.size {
		c.t.Errorf("size after writing past the end: got %d, want %d", got, c.size)
	}
	if n, err := c.d.ReadAt(make([]byte, 1), c.size); n != 0 || err == nil {
		c.t.Errorf("read behind the end after writing there: got %d bytes and error %v, want 0 and an error", n, err)
	}
}

// zero zeroes with each flag.
func (c *deviceTest) zero() {
	c.t.Helper()
	z, ok := c.d.(nbd.ZeroWriter)
	if !ok {
		return
	}
	for flags := range 4 {
		noHole, fast := flags&1 != 0, flags&2 != 0
		c.ranges([]int{0, 1, 512, 4097, 70000}, func(r region, at, n int) {
			err := z.WriteZeroes(r.off+int64(at), int64(n), noHole, fast)
			switch {
			case err == nil:
				clear(r.data[at : at+n])
			case !fast || !isNotSupported(err):
				c.t.Errorf("zero %d bytes at %d, noHole %v, fast %v: got error %v", n, r.off+int64(at), noHole, fast, err)
				c.write("zeroes", r.off+int64(at), make([]byte, n))
			}
			// A call that refuses to be fast must change nothing.
			c.around("zeroed", r, at, n)
		})
	}
}

func isNotSupported(err error) bool {
	return errors.Is(err, wire.ENOTSUP) || errors.Is(err, syscall.ENOTSUP)
}

// trim checks that Trim does not change the bytes around the range, and that the range can
// be written to again.
func (c *deviceTest) trim() {
	c.t.Helper()
	trimmer, ok := c.d.(nbd.Trimmer)
	if !ok {
		return
	}
	c.ranges([]int{0, 1, 512, 4097, 70000}, func(r region, at, n int) {
		off := r.off + int64(at)
		if err := trimmer.Trim(off, int64(n)); err != nil {
			c.t.Errorf("trim %d bytes at %d: got error %v, want none", n, off, err)
		}
		if x, ok := c.d.(nbd.Extenter); ok && n > 0 {
			c.extentsOf("after a trim", x, off, int64(n))
		}
		copy(r.data[at:at+n], c.read(off, n)) // not defined after Trim
		c.around("trimmed", r, at, n)
		if n > 1 {
			c.write("trimmed", off, noise(n/2, 5))
			c.around("written after a trim", r, at, n)
		}
	})
}

// cache calls Cache for holes and data.
func (c *deviceTest) cache() {
	c.t.Helper()
	cacher, ok := c.d.(nbd.Cacher)
	if !ok {
		return
	}
	for _, s := range append(c.spans(7, 10), region{0, make([]byte, min(c.size, wholeLimit))}) {
		if err := cacher.Cache(s.off, int64(len(s.data))); err != nil {
			c.t.Errorf("cache %d bytes at %d: got error %v, want none", len(s.data), s.off, err)
		}
	}
	c.expectAll("after caching")
}

// maxSteps limits the number of extents that are checked.
const maxSteps = 10_000

// extents checks the extents of the whole device, as a client asks for them, and of ranges.
func (c *deviceTest) extents(when string) {
	c.t.Helper()
	x, ok := c.d.(nbd.Extenter)
	if !ok {
		return
	}
	steps := 0
	for off := int64(0); off < c.size && steps < maxSteps; steps++ {
		n := c.extentsOf(when, x, off, c.size-off)
		if n == 0 {
			return // was reported
		}
		off += n
	}
	for _, s := range c.spans(9, 5) {
		c.extentsOf(when, x, s.off, int64(len(s.data)))
		c.extentsOf(when, x, s.off, 1)
	}
}

// extentsOf asks for extents once, and returns where the last one ends.
func (c *deviceTest) extentsOf(when string, x nbd.Extenter, off, n int64) int64 {
	c.t.Helper()
	extents, err := x.Extents(off, n)
	if err != nil || len(extents) == 0 {
		c.t.Errorf("%s: extents of %d bytes at %d: got %v and error %v, want some", when, n, off, extents, err)
		return 0
	}
	at := off
	for i, e := range extents {
		switch {
		case e.Length == 0 || e.Length > uint64(c.size-at):
			c.t.Errorf("%s: extents of %d bytes at %d: extent %d has %d bytes, of which %d are left", when, n, off, i, e.Length, c.size-at)
			return 0
		case at >= off+n:
			c.t.Errorf("%s: extents of %d bytes at %d: extent %d begins at %d, behind the range", when, n, off, i, at)
		case e.Status&^(wire.StateHole|wire.StateZero) != 0:
			c.t.Errorf("%s: extents of %d bytes at %d: extent %d has the unknown status %#x", when, n, off, i, e.Status)
		case e.Status&wire.StateZero != 0:
			c.expectZero(when, at, at+int64(e.Length))
		}
		at += int64(e.Length)
	}
	if r, ok := x.(nbd.DataRunner); ok {
		data, length := r.DataRun(off, n)
		if length <= 0 || length > n {
			c.t.Errorf("%s: data run of %d bytes at %d: got %d bytes", when, n, off, length)
		} else if !data {
			c.expectZero(when, off, off+length)
		}
	}
	return at - off
}

// expectZero reads the parts of a range whose content is known.
func (c *deviceTest) expectZero(when string, begin, end int64) {
	c.t.Helper()
	for _, r := range c.regions {
		from, to := max(begin, r.off), min(end, r.off+int64(len(r.data)))
		if from >= to {
			continue
		}
		if p := c.read(from, int(to-from)); bytes.Count(p, []byte{0}) != len(p) {
			c.t.Errorf("%s: %d bytes at %d are said to be zeroes, and are not", when, to-from, from)
		}
	}
}

// coherent checks the promise of MultiConn: a change that was flushed on one device is read
// on another one.
func (c *deviceTest) coherent(open func() nbd.Device) {
	c.t.Helper()
	if m, ok := c.d.(nbd.MultiConner); !ok || !m.MultiConn() {
		return
	}
	other := open()
	second := &deviceTest{t: c.t, d: other, size: c.size, regions: c.regions}
	second.expectAll("another device of the same storage")
	for seed := range uint64(3) {
		for _, r := range c.regions {
			c.write("to be seen by others", r.off, noise(min(len(r.data), 100_000), 100+seed))
		}
		c.flush()
		second.expectAll("what another device has flushed")
	}
	if err := other.Close(); err != nil {
		c.t.Errorf("another device: Close: got error %v, want none", err)
	}
	c.expectAll("after another device was closed")
}
