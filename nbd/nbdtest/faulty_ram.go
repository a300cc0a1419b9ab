package nbdtest

import (
	"io"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/wire"
)

var _ interface {
	nbd.Device
	io.WriterAt
	nbd.Flusher
	nbd.Trimmer
	nbd.ZeroWriter
	nbd.Cacher
	nbd.Extenter
	nbd.MultiConner
} = (*FaultyRAM)(nil)

// FaultyRAM is a [Faulty] with all methods of a [RAM]. Its faults apply to every call with
// a range, not only to reads: the bytes before the first fault are changed, the others are
// not. Hold makes every call wait. Its methods may be called concurrently.
type FaultyRAM struct {
	*Faulty
	RAM *RAM // inside

	flushErr error // guarded by Faulty.mu
}

// NewFaultyRAM returns a FaultyRAM that wraps r and has no faults. Closing it closes r.
func NewFaultyRAM(r *RAM) *FaultyRAM { return &FaultyRAM{Faulty: NewFaulty(r), RAM: r} }

// FailFlush makes every Flush fail with err, or none if err is nil.
func (f *FaultyRAM) FailFlush(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.flushErr = err
}

// WriteAt implements [io.WriterAt], except for its faults.
func (f *FaultyRAM) WriteAt(p []byte, off int64) (int, error) {
	bad, hit := f.pass(off, int64(len(p)))
	if !hit {
		return f.RAM.WriteAt(p, off)
	}
	n, err := f.RAM.WriteAt(p[:max(bad.off-off, 0)], off)
	if err == nil {
		err = bad.err
	}
	return n, err
}

// Flush implements [nbd.Flusher], except for FailFlush.
func (f *FaultyRAM) Flush() error {
	f.pass(0, 0)
	f.mu.Lock()
	err := f.flushErr
	f.mu.Unlock()
	if err != nil {
		return err
	}
	return f.RAM.Flush()
}

// Trim implements [nbd.Trimmer], except for its faults.
func (f *FaultyRAM) Trim(off, n int64) error {
	return f.try(off, n, func(n int64) error { return f.RAM.Trim(off, n) })
}

// WriteZeroes implements [nbd.ZeroWriter], except for its faults.
func (f *FaultyRAM) WriteZeroes(off, n int64, noHole, fast bool) error {
	return f.try(off, n, func(n int64) error { return f.RAM.WriteZeroes(off, n, noHole, fast) })
}

// Cache implements [nbd.Cacher], except for its faults.
func (f *FaultyRAM) Cache(off, n int64) error {
	return f.try(off, n, func(n int64) error { return f.RAM.Cache(off, n) })
}

// Extents implements [nbd.Extenter], except for its faults.
func (f *FaultyRAM) Extents(off, n int64) (extents []wire.Extent, err error) {
	err = f.try(off, n, func(n int64) error {
		extents, err = f.RAM.Extents(off, n)
		return err
	})
	if err != nil {
		return nil, err
	}
	return extents, nil
}

// MultiConn returns that of the wrapped device.
func (f *FaultyRAM) MultiConn() bool { return f.RAM.MultiConn() }

// try calls a function for the part of a range before its first fault.
func (f *FaultyRAM) try(off, n int64, do func(n int64) error) error {
	bad, hit := f.pass(off, n)
	if !hit {
		return do(n)
	}
	if err := do(max(bad.off-off, 0)); err != nil {
		return err
	}
	return bad.err
}
