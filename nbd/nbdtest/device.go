package nbdtest

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"xapi-nbd/nbd"
)

// wholeLimit is the size, in bytes, up to which TestDevice reads all of a device. Of larger
// ones it reads the beginning and the end.
const wholeLimit = 8 << 20

// TestDevice checks that the devices that open returns obey the contract of [nbd.Device].
// open is called more than once and must return a device with the same content each time;
// if it cannot, it must fail the test. TestDevice closes every device.
//
// It checks one thing more than the contract: reads across the end must behave like those
// of an [io.ReaderAt], because copying tools rely on it.
//
// It checks the optional interfaces that the device has. It writes to a device that is an
// [io.WriterAt], and restores its content at the end. If MultiConn returns true for such a
// device, all devices that open returns must have the same storage.
// A client's connection to a read-only export counts as one that cannot be
// written.
func TestDevice(t testing.TB, open func() nbd.Device) {
	t.Helper()
	d := open()
	c := &deviceTest{t: t, d: d, size: d.Size()}
	if c.size < 0 {
		t.Errorf("size: got %d, want at least 0", c.size)
		d.Close()
		return
	}
	c.load()
	for _, check := range []func(){c.readSizes, c.readOffsets, c.readEmpty, c.readRandom, c.readConcurrently, c.readPastEnd} {
		check()
	}
	c.capabilities(open)
	if got := d.Size(); got != c.size {
		t.Errorf("size after reading: got %d, want %d as before", got, c.size)
	}
	if err := d.Close(); err != nil {
		t.Errorf("Close: got error %v, want none", err)
	}

	// Changes of the first device must not change the next one.
	c.d = open()
	if got := c.d.Size(); got != c.size {
		t.Errorf("size when opened again: got %d, want %d", got, c.size)
	}
	for _, r := range c.regions {
		c.expect("opened again", r.off, len(r.data))
	}
	if err := c.d.Close(); err != nil {
		t.Errorf("second device: Close: got error %v, want none", err)
	}
}

// region is a range of the device and the content that it must have.
type region struct {
	off  int64
	data []byte
}

type deviceTest struct {
	t       testing.TB
	d       nbd.Device
	w       io.WriterAt // d, if it can be written to
	size    int64
	regions []region
}

// load reads the content that all later reads are compared to.
func (c *deviceTest) load() {
	c.t.Helper()
	if c.size <= wholeLimit {
		c.regions = []region{{off: 0, data: c.read(0, int(c.size))}}
		return
	}
	const half = wholeLimit / 2
	c.regions = []region{
		{off: 0, data: c.read(0, half)},
		{off: c.size - half, data: c.read(c.size-half, half)},
	}
}

func (c *deviceTest) read(off int64, n int) []byte {
	c.t.Helper()
	p := make([]byte, n)
	if got, err := c.d.ReadAt(p, off); got != n || (err != nil && !errors.Is(err, io.EOF)) {
		c.t.Errorf("read of %d bytes at %d: got %d and error %v, want all", n, off, got, err)
	}
	return p
}

// expect reads n bytes at off, which are inside a region.
func (c *deviceTest) expect(what string, off int64, n int) {
	c.t.Helper()
	const guard = 0xa5
	room := bytes.Repeat([]byte{guard}, n+16)
	p := room[:n]
	got, err := c.d.ReadAt(p, off)
	switch {
	case got != n:
		c.t.Errorf("%s: read of %d bytes at %d: got %d bytes and error %v, want all", what, n, off, got, err)
	case err != nil && (!errors.Is(err, io.EOF) || off+int64(n) != c.size):
		c.t.Errorf("%s: read of %d bytes at %d: got error %v beside all bytes", what, n, off, err)
	case !bytes.Equal(p, c.known(off, n)):
		c.t.Errorf("%s: read of %d bytes at %d: content differs from an earlier read", what, n, off)
	case bytes.Count(room[n:], []byte{guard}) != 16:
		c.t.Errorf("%s: read of %d bytes at %d wrote behind its buffer", what, n, off)
	}
}

func (c *deviceTest) known(off int64, n int) []byte {
	for _, r := range c.regions {
		if at := off - r.off; at >= 0 && at+int64(n) <= int64(len(r.data)) {
			return r.data[at : at+int64(n)]
		}
	}
	return nil
}

// readSizes reads every region in pieces of each size.
func (c *deviceTest) readSizes() {
	c.t.Helper()
	for _, step := range []int{512, 4095, 4096, 65536, 1 << 20} {
		for _, r := range c.regions {
			// Small pieces of a large region would take long, and the small
			// region is read in small pieces too.
			data := min(len(r.data), 256*step)
			for at := 0; at < data; at += step {
				c.expect("in pieces", r.off+int64(at), min(step, data-at))
			}
		}
	}
}

// readOffsets reads around every boundary to which a device might round.
func (c *deviceTest) readOffsets() {
	c.t.Helper()
	for _, r := range c.regions {
		for _, edge := range []int{0, 1, 512, 4096, 65536, 1 << 20, len(r.data) / 2, len(r.data)} {
			for _, n := range []int{1, 2, 511, 512, 513, 4097} {
				for _, at := range []int{edge - n, edge - n/2, edge - 1, edge, edge + 1} {
					if at >= 0 && at+n <= len(r.data) {
						c.expect("unaligned", r.off+int64(at), n)
					}
				}
			}
		}
	}
}

// readEmpty reads 0 bytes at several offsets.
func (c *deviceTest) readEmpty() {
	c.t.Helper()
	for _, off := range []int64{0, c.size / 2, c.size} {
		n, err := c.d.ReadAt(nil, off)
		if n != 0 || (err != nil && (!errors.Is(err, io.EOF) || off != c.size)) {
			c.t.Errorf("read of nothing at %d: got %d and error %v, want 0 and none", off, n, err)
		}
	}
}

// spans returns random ranges inside the regions, the same ones for the same seed.
func (c *deviceTest) spans(seed uint64, count int) []region {
	rnd := rand.New(rand.NewPCG(seed, 0))
	var spans []region
	for range count {
		r := c.regions[rnd.IntN(len(c.regions))]
		if len(r.data) == 0 {
			continue
		}
		at := rnd.IntN(len(r.data))
		n := 1 + rnd.IntN(min(len(r.data)-at, 1<<17))
		spans = append(spans, region{r.off + int64(at), r.data[at : at+n]})
	}
	return spans
}

func (c *deviceTest) readRandom() {
	c.t.Helper()
	for _, s := range c.spans(1, 100) {
		c.expect("random", s.off, len(s.data))
	}
}

func (c *deviceTest) readConcurrently() {
	c.t.Helper()
	var wg sync.WaitGroup
	for seed := range uint64(8) {
		wg.Go(func() {
			for _, s := range c.spans(100+seed, 40) {
				c.expect("concurrent", s.off, len(s.data))
			}
		})
	}
	wg.Wait()
}

// readPastEnd reads across and after the end: the bytes before the end are returned together
// with an error.
func (c *deviceTest) readPastEnd() {
	c.t.Helper()
	for _, behind := range []int{1, 512, 5000} {
		for _, inside := range []int64{0, 1, 512, 4096} {
			if inside > c.size {
				continue
			}
			off := c.size - inside
			p := make([]byte, int(inside)+behind)
			n, err := c.d.ReadAt(p, off)
			switch {
			case int64(n) > inside:
				c.t.Errorf("read of %d bytes, %d before the end: got %d bytes", len(p), inside, n)
			case err == nil:
				c.t.Errorf("read of %d bytes, %d before the end: got %d bytes and no error", len(p), inside, n)
			case !bytes.Equal(p[:n], c.known(off, n)):
				c.t.Errorf("read of %d bytes, %d before the end: content differs from an earlier read", len(p), inside)
			}
		}
	}
	if n, err := c.d.ReadAt(make([]byte, 1), c.size+4096); n != 0 || err == nil {
		c.t.Errorf("read behind the end: got %d bytes and error %v, want 0 and an error", n, err)
	}
}
