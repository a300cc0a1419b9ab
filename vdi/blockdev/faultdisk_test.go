package blockdev

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"golang.org/x/sys/unix"

	"xapi-nbd/internal/flush"
)

// faultDisk is a disk in memory with a volatile write cache: writes are visible to reads at once,
// and survive a loss of power after sync or with durable. It refuses unaligned calls as the
// kernel does, makes short writes now and then, and can fail.
type faultDisk struct {
	mu      sync.Mutex // guards the fields below
	rng     *rand.Rand
	data    []byte             // the content that reads return
	durable []byte             // the content after a loss of power, without any write of the cache
	cached  map[int64][][]byte // by block: the contents since the durable one
	zeroing bool               // zero is supported
	failing float64            // probability with which a call fails
}

const faultBlock = 512

func newFaultDisk(rng *rand.Rand, size int) *faultDisk {
	d := &faultDisk{rng: rng, data: make([]byte, size), cached: map[int64][][]byte{}, zeroing: rng.IntN(2) == 0}
	for i := range d.data {
		d.data[i] = byte(rng.Uint32())
	}
	d.durable = bytes.Clone(d.data)
	return d
}

// set changes whole blocks.
func (d *faultDisk) set(p []byte, off int64, durable bool) {
	for ; len(p) > 0; p, off = p[faultBlock:], off+faultBlock {
		block := bytes.Clone(p[:faultBlock])
		copy(d.data[off:], block)
		if durable {
			copy(d.durable[off:], block)
			delete(d.cached, off)
		} else {
			d.cached[off] = append(d.cached[off], block)
		}
	}
}

// losePower leaves each block with its durable content or any later one.
func (d *faultDisk) losePower() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for off := int64(0); off < int64(len(d.data)); off += faultBlock { // in order, to be repeatable
		if later := d.cached[off]; len(later) > 0 {
			if n := d.rng.IntN(len(later) + 1); n > 0 {
				copy(d.durable[off:], later[n-1])
			}
		}
	}
	clear(d.cached)
	copy(d.data, d.durable)
}

// content returns the bytes that are read.
func (d *faultDisk) content() []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return bytes.Clone(d.data)
}

// open returns a Device of the disk, as it is opened by one process.
func (d *faultDisk) open() (*Device, *faultProcess) {
	p := &faultProcess{d: d}
	dev := &Device{
		io: p, path: "fault disk", size: int64(len(d.data)), minBlock: faultBlock, direct: true,
		writer: &writer{block: faultBlock, canTrim: true, locks: newSpanLocks(), flushes: flush.NewGroup()},
	}
	dev.unit.Store(faultBlock)
	return dev, p
}

// faultProcess has the calls of one process, which can be held, and end when it is killed.
type faultProcess struct {
	d *faultDisk

	mu     sync.Mutex
	gate   chan struct{} // calls that change the disk wait until it is closed; nil: they do not wait
	killed bool
}

// hold makes calls that change the disk wait until release or kill.
func (p *faultProcess) hold() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gate = make(chan struct{})
}

func (p *faultProcess) release() { p.end(false) }

// kill ends the process: each call that is in flight is executed or not, and none succeeds.
func (p *faultProcess) kill() { p.end(true) }

func (p *faultProcess) end(killed bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.killed = killed
	if p.gate != nil {
		close(p.gate)
		p.gate = nil
	}
}

// change makes a call that changes the disk; do gets a random part of n blocks. It returns the
// bytes that were changed.
func (p *faultProcess) change(n int64, do func(d *faultDisk, n int64)) (int, error) {
	p.mu.Lock()
	gate := p.gate
	p.mu.Unlock()
	if gate != nil {
		<-gate
	}
	p.mu.Lock()
	killed := p.killed
	p.mu.Unlock()
	d := p.d
	d.mu.Lock()
	defer d.mu.Unlock()
	failed := d.rng.Float64() < d.failing
	if killed || failed || d.rng.IntN(8) == 0 {
		n = d.rng.Int64N(n/faultBlock+1) * faultBlock
	}
	switch do(d, n); {
	case killed, failed:
		return 0, unix.EIO
	case n == 0:
		return 0, unix.EINTR
	}
	return int(n), nil
}

func misaligned(p []byte, off int64) bool {
	return off%faultBlock != 0 || len(p)%faultBlock != 0 || !isAligned(p, faultBlock)
}

func (p *faultProcess) pread(b []byte, off int64) (int, error) {
	if misaligned(b, off) {
		return 0, unix.EINVAL
	}
	p.d.mu.Lock()
	defer p.d.mu.Unlock()
	return copy(b, p.d.data[off:]), nil
}

func (p *faultProcess) pwrite(b []byte, off int64, durable bool) (int, error) {
	if misaligned(b, off) {
		return 0, unix.EINVAL
	}
	return p.change(int64(len(b)), func(d *faultDisk, n int64) { d.set(b[:n], off, durable) })
}

func (p *faultProcess) sync() error {
	_, err := p.change(faultBlock, func(d *faultDisk, n int64) {
		if n > 0 {
			copy(d.durable, d.data)
			clear(d.cached)
		}
	})
	return err
}

// discard leaves any content in each block.
func (p *faultProcess) discard(off, n int64) error {
	_, err := p.change(n, func(d *faultDisk, n int64) {
		for ; n > 0; off, n = off+faultBlock, n-faultBlock {
			if garbage := make([]byte, faultBlock); d.rng.IntN(2) == 0 {
				d.set(garbage, off, false)
			} else if d.rng.IntN(2) == 0 {
				d.set(bytes.Repeat([]byte{0xdb}, faultBlock), off, false)
			}
		}
	})
	return err
}

func (p *faultProcess) zero(off, n int64) error {
	if !p.d.zeroing {
		return unix.EOPNOTSUPP
	}
	want := n
	done, err := p.change(n, func(d *faultDisk, n int64) { d.set(make([]byte, n), off, false) })
	if err == nil && int64(done) < want {
		err = unix.EINTR // no part of it counts
	}
	return err
}

// forgetful reports an error of a flush once, as the kernel does: at the end of the first call.
type forgetful struct {
	storage
	calls atomic.Int32
	first chan error // the result of the first call
}

func (f *forgetful) sync() error {
	if f.calls.Add(1) == 1 {
		return <-f.first
	}
	return nil
}

// A flush that overlaps one that fails does not succeed.
func TestOverlappingFlushes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, _ := newFaultDisk(rand.New(rand.NewPCG(0, 0)), 8*faultBlock).open()
		f := &forgetful{storage: d.io, first: make(chan error)}
		d.io = f
		results := make(chan error, 2)
		for range cap(results) {
			go func() { results <- d.Flush() }()
			synctest.Wait()
		}
		f.first <- unix.EIO
		for range cap(results) {
			if err := <-results; !errors.Is(err, unix.EIO) {
				t.Errorf("got %v, want EIO", err)
			}
		}
	})
}

// Through the page cache a flush waits for the writes in flight: it could get the error of one,
// which would succeed then.
func TestFlushThroughThePageCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, p := newFaultDisk(rand.New(rand.NewPCG(0, 0)), 8*faultBlock).open()
		f := &forgetful{storage: d.io, first: make(chan error)}
		d.io, d.direct = f, false
		p.hold()
		results := make(chan error, 2)
		go func() { results <- d.WriteFUA(make([]byte, faultBlock), 0) }()
		synctest.Wait()
		go func() { results <- d.Flush() }()
		synctest.Wait()
		if n := f.calls.Load(); n > 0 {
			t.Error("a flush has begun during a write")
		}
		p.release()
		f.first <- nil
		for range cap(results) {
			if err := <-results; err != nil {
				t.Error(err)
			}
		}
	})
}
