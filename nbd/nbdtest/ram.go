package nbdtest

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"sync"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/wire"
)

var _ interface {
	nbd.Device
	nbd.BlockSizer
	nbd.Describer
	io.WriterAt
	nbd.Flusher
	nbd.Trimmer
	nbd.ZeroWriter
	nbd.Cacher
	nbd.Extenter
	nbd.MultiConner
} = (*RAM)(nil)

// RAM is a device in memory that can be written to and has all optional interfaces for
// reading and writing. It tracks which content would survive a power failure and which
// parts are holes, and records calls against the contract like [Mem]. The fields must not
// change once it is in use. The methods may be called concurrently.
type RAM struct {
	Mem
	// SlowZeroes makes WriteZeroes fail with ENOTSUP if it must be fast.
	SlowZeroes bool

	m *memory

	mu    sync.Mutex // guards calls
	calls RAMCalls
}

// RAMCalls has the number of calls of each method of a RAM, without misuses.
type RAMCalls struct {
	Writes, Flushes, Trims, Zeroes, Caches, Extents int
}

// memory is the storage of a RAM, which several devices may have in common.
type memory struct {
	mu     sync.RWMutex // guards the fields below
	data   []byte
	stable []byte   // data at the last flush
	status []uint64 // of each block of ramBlock bytes
}

// ramBlock is the granularity, in bytes, of the holes of a RAM.
const ramBlock = 512

// NewRAM returns a device with a copy of content, all of it on stable storage. Blocks of 512
// bytes that are all zeroes are holes.
func NewRAM(content []byte) *RAM {
	m := &memory{data: slices.Clone(content), stable: slices.Clone(content)}
	for off := 0; off < len(content); off += ramBlock {
		block := content[off:min(off+ramBlock, len(content))]
		var status uint64
		if bytes.Count(block, []byte{0}) == len(block) {
			status = wire.StateHole | wire.StateZero
		}
		m.status = append(m.status, status)
	}
	return newRAM(m)
}

func newRAM(m *memory) *RAM {
	return &RAM{m: m, Mem: Mem{size: int64(len(m.data)), fill: m.read}}
}

// Again returns another device with the same storage and fields, for another connection.
// Each device counts its own calls.
func (r *RAM) Again() *RAM {
	n := newRAM(r.m)
	n.Min, n.Preferred, n.MaxPayload, n.Text, n.SlowZeroes = r.Min, r.Preferred, r.MaxPayload, r.Text, r.SlowZeroes
	return n
}

// Content returns a copy of the content.
func (r *RAM) Content() []byte {
	r.m.mu.RLock()
	defer r.m.mu.RUnlock()
	return slices.Clone(r.m.data)
}

// Stable returns a copy of the content after a power failure: with all changes before the
// last flush, and none after it.
func (r *RAM) Stable() []byte {
	r.m.mu.RLock()
	defer r.m.mu.RUnlock()
	return slices.Clone(r.m.stable)
}

// Calls returns the calls of this device up to now.
func (r *RAM) Calls() RAMCalls {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.calls
}

// WriteAt implements [io.WriterAt].
func (r *RAM) WriteAt(p []byte, off int64) (int, error) {
	err := r.do("WriteAt", off, int64(len(p)), func(c *RAMCalls) { c.Writes++ }, func() {
		copy(r.m.data[off:], p)
		for b := off / ramBlock; b*ramBlock < off+int64(len(p)); b++ {
			r.m.status[b] = 0
		}
	})
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// Flush implements [nbd.Flusher].
func (r *RAM) Flush() error {
	return r.do("Flush", 0, 0, func(c *RAMCalls) { c.Flushes++ }, func() { copy(r.m.stable, r.m.data) })
}

// Trim implements [nbd.Trimmer]. Blocks inside the range become holes, others do not change.
func (r *RAM) Trim(off, n int64) error {
	return r.do("Trim", off, n, func(c *RAMCalls) { c.Trims++ }, func() {
		begin, end := r.m.mark(off, n, wire.StateHole|wire.StateZero)
		clear(r.m.data[begin:end])
	})
}

// WriteZeroes implements [nbd.ZeroWriter]. It is fast unless SlowZeroes.
func (r *RAM) WriteZeroes(off, n int64, noHole, fast bool) error {
	if fast && r.SlowZeroes {
		return r.do("WriteZeroes", off, n, func(c *RAMCalls) { c.Zeroes++ }, nil)
	}
	status := wire.StateHole | wire.StateZero
	if noHole {
		status = wire.StateZero
	}
	return r.do("WriteZeroes", off, n, func(c *RAMCalls) { c.Zeroes++ }, func() {
		r.m.mark(off, n, status)
		clear(r.m.data[off : off+n])
	})
}

// Cache implements [nbd.Cacher] and does nothing.
func (r *RAM) Cache(off, n int64) error {
	return r.do("Cache", off, n, func(c *RAMCalls) { c.Caches++ }, func() {})
}

// Extents implements [nbd.Extenter]. All extents of the range are returned, the
// last one cut at its end.
func (r *RAM) Extents(off, n int64) ([]wire.Extent, error) {
	var extents []wire.Extent
	err := r.do("Extents", off, n, func(c *RAMCalls) { c.Extents++ }, func() {
		for at := off; at < off+n; {
			status := r.m.status[at/ramBlock]
			end := min((at/ramBlock+1)*ramBlock, off+n)
			if last := len(extents) - 1; last >= 0 && extents[last].Status == status {
				extents[last].Length += uint64(end - at)
			} else {
				extents = append(extents, wire.Extent{Length: uint64(end - at), Status: status})
			}
			at = end
		}
	})
	return extents, err
}

// MultiConn implements [nbd.MultiConner]. It returns true: see Again.
func (r *RAM) MultiConn() bool { return true }

// do calls work, which may be nil for a call that does nothing, with the storage locked. It
// records misuses as Mem does for ReadAt.
func (r *RAM) do(method string, off, n int64, count func(*RAMCalls), work func()) error {
	if err := r.enter(method, off, n); err != nil {
		return err
	}
	defer r.leave()
	r.mu.Lock()
	count(&r.calls)
	r.mu.Unlock()
	if work == nil {
		return fmt.Errorf("nbdtest: %s: %w", method, wire.ENOTSUP)
	}
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	work()
	return nil
}

func (r *RAM) enter(method string, off, n int64) error {
	m := &r.Mem
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.closes > 0:
		m.record("%s after Close", method)
		return ErrClosed
	case off < 0 || n < 0 || off > m.size || n > m.size-off:
		m.record("%s of %d bytes at %d of %d", method, n, off, m.size)
		return fmt.Errorf("nbdtest: %s of %d bytes at %d of %d: %w", method, n, off, m.size, wire.EINVAL)
	}
	m.changing++
	return nil
}

func (r *RAM) leave() {
	r.Mem.mu.Lock()
	defer r.Mem.mu.Unlock()
	r.changing--
}

func (m *memory) read(p []byte, off int64) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	copy(p, m.data[off:])
}

// mark sets the status of the blocks inside a range, and returns where they begin and end;
// m.mu is held. The last block of the device may be shorter.
func (m *memory) mark(off, n int64, status uint64) (begin, end int64) {
	size := int64(len(m.data))
	begin, end = (off+ramBlock-1)/ramBlock*ramBlock, off+n
	if end != size {
		end = end / ramBlock * ramBlock
	}
	if begin >= end {
		return 0, 0
	}
	for b := begin / ramBlock; b*ramBlock < end; b++ {
		m.status[b] = status
	}
	return begin, end
}
