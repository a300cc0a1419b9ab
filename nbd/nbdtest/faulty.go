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

// Faulty is a device whose reads can be made to fail, to return too few bytes, or to wait.
// Its other methods are those of the device that it wraps. Its methods may be called
// concurrently.
type Faulty struct {
	nbd.Device

	mu     sync.Mutex // guards the fields below
	faults []fault
	held   *held
}

// fault is a range that cannot be read.
type fault struct {
	off, end int64
	err      error
}

func (f fault) touches(off, end int64) bool { return off < f.end && end > f.off }

// held is the state between Hold and release.
type held struct {
	arrived chan struct{}
	open    chan struct{}
}

// NewFaulty returns a Faulty that wraps d and has no faults. Closing it closes d.
func NewFaulty(d nbd.Device) *Faulty { return &Faulty{Device: d} }

// Fail makes every read of any of the n bytes at off fail with err. The bytes before them are
// read, as by a disk. If err is nil such a read returns too few bytes and no error, which
// the contract of a device forbids.
func (f *Faulty) Fail(off, n int64, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = append(f.faults, fault{off, off + n, err})
}

// Short is Fail with a nil error.
func (f *Faulty) Short(off, n int64) { f.Fail(off, n, nil) }

// Heal removes all faults.
func (f *Faulty) Heal() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = nil
}

// Hold makes every read from now on wait for release. Each read first sends to arrived: when
// a test has received n times, n reads are in flight. After release reads do not wait any
// more. release may be called again.
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

// wait returns when the read need not wait any more.
func (h *held) wait() {
	select {
	case h.arrived <- struct{}{}:
		<-h.open
	case <-h.open:
	}
}

// ReadAt implements [io.ReaderAt], except for its faults.
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

// pass waits while calls are held, and returns the first fault in a range.
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

// BlockSizes returns those of the wrapped device, zeroes if it has none.
func (f *Faulty) BlockSizes() (minimum, preferred, maxPayload uint32) {
	if d, ok := f.Device.(nbd.BlockSizer); ok {
		return d.BlockSizes()
	}
	return 0, 0, 0
}

// Description returns that of the wrapped device, "" if it has none.
func (f *Faulty) Description() string {
	if d, ok := f.Device.(nbd.Describer); ok {
		return d.Description()
	}
	return ""
}
