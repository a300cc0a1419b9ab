package nbdtest

import (
	"sync"

	"xapi-nbd/nbd"
)

var (
	_ nbd.Device     = (*Faulty)(nil)
	_ nbd.BlockSizer = (*Faulty)(nil)
	_ nbd.Describer  = (*Faulty)(nil)
)

// Faulty is a device whose reads fail, stop short or wait as a test wants.
// Everything else it leaves to the device inside. Its methods may be called
// concurrently.
type Faulty struct {
	nbd.Device

	mu     sync.Mutex // guards what follows
	faults []fault
	held   *held
}

// fault is a range that cannot be read.
type fault struct {
	off, end int64
	err      error
}

func (f fault) touches(off, end int64) bool { return off < f.end && end > f.off }

// held is what reads wait for between Hold and release.
type held struct {
	arrived chan struct{}
	open    chan struct{}
}

// NewFaulty returns d without any faults yet. Closing the result closes d.
func NewFaulty(d nbd.Device) *Faulty { return &Faulty{Device: d} }

// Fail makes every read that touches the n bytes at off fail with err. The
// bytes before them are read, as disks do it. With a nil err reads stop short
// there without saying why, which no device may do.
func (f *Faulty) Fail(off, n int64, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = append(f.faults, fault{off, off + n, err})
}

// Short makes every read that touches the n bytes at off stop short without an
// error.
func (f *Faulty) Short(off, n int64) { f.Fail(off, n, nil) }

// Heal forgets all failures.
func (f *Faulty) Heal() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = nil
}

// Hold makes every read from now on wait for release. Each one first delivers
// to arrived: a test that received n times knows that n reads are in flight.
// After release, which may be called again, reads run as before.
func (f *Faulty) Hold() (arrived <-chan struct{}, release func()) {
	h := &held{arrived: make(chan struct{}), open: make(chan struct{})}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.held = h
	return h.arrived, sync.OnceFunc(func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.held == h {
			f.held = nil
		}
		close(h.open)
	})
}

// wait is over when nobody holds the read any more.
func (h *held) wait() {
	select {
	case h.arrived <- struct{}{}:
		<-h.open
	case <-h.open:
	}
}

// ReadAt implements [io.ReaderAt], apart from its faults.
func (f *Faulty) ReadAt(p []byte, off int64) (int, error) {
	bad, hit := f.pass(off, int64(len(p)))
	if !hit {
		return f.Device.ReadAt(p, off)
	}
	n, err := f.Device.ReadAt(p[:max(bad.off-off, 0)], off)
	if err == nil {
		err = bad.err
	}
	return n, err
}

// pass waits while calls are held, and finds the first fault in a range.
func (f *Faulty) pass(off, n int64) (first fault, hit bool) {
	f.mu.Lock()
	h := f.held
	f.mu.Unlock()
	if h != nil {
		h.wait()
	}
	return f.firstFault(off, off+n)
}

func (f *Faulty) firstFault(off, end int64) (first fault, hit bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, b := range f.faults {
		if b.touches(off, end) && (!hit || b.off < first.off) {
			first, hit = b, true
		}
	}
	return first, hit
}

// BlockSizes are those of the device inside, zeroes if it has none.
func (f *Faulty) BlockSizes() (minimum, preferred, maxPayload uint32) {
	if d, ok := f.Device.(nbd.BlockSizer); ok {
		return d.BlockSizes()
	}
	return 0, 0, 0
}

// Description is that of the device inside, empty if it has none.
func (f *Faulty) Description() string {
	if d, ok := f.Device.(nbd.Describer); ok {
		return d.Description()
	}
	return ""
}
