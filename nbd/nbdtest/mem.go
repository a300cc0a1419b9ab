package nbdtest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"xapi-nbd/nbd"
)

var (
	_ nbd.Device     = (*Mem)(nil)
	_ nbd.BlockSizer = (*Mem)(nil)
	_ nbd.Describer  = (*Mem)(nil)
)

// Mem is a device with known content that remembers whether its user kept to
// the contract of [nbd.Device]. The fields must not change once it is in use;
// the methods may be called concurrently.
type Mem struct {
	// Min, Preferred and MaxPayload are what BlockSizes returns, in bytes.
	Min, Preferred, MaxPayload uint32
	// Text is what Description returns.
	Text string
	// CloseErr is what the first Close returns.
	CloseErr error

	size int64
	fill func(p []byte, off int64)

	mu       sync.Mutex // guards what follows
	reads    int
	reading  int
	changing int // calls of a RAM's other methods under way
	closes   int
	misuse   []error
}

// NewMem returns a device of size bytes that holds what [Fill] makes of the
// seed. It is computed on demand: size may be larger than memory.
func NewMem(size int64, seed uint64) *Mem {
	return &Mem{size: size, fill: func(p []byte, off int64) { Fill(p, off, seed) }}
}

// MemOf returns a device that holds content, which must not change.
func MemOf(content []byte) *Mem {
	return &Mem{size: int64(len(content)), fill: func(p []byte, off int64) { copy(p, content[off:]) }}
}

// ErrClosed is what reads get after Close.
var ErrClosed = errors.New("nbdtest: device is closed")

// ReadAt implements [io.ReaderAt].
func (m *Mem) ReadAt(p []byte, off int64) (int, error) {
	if err := m.begin(off); err != nil {
		return 0, err
	}
	defer m.end()
	n := len(p)
	var err error
	if rest := m.size - off; int64(n) > rest {
		n, err = int(max(rest, 0)), io.EOF
	}
	if n > 0 {
		m.fill(p[:n], off)
	}
	return n, err
}

func (m *Mem) begin(off int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.closes > 0:
		m.record("ReadAt after Close")
		return ErrClosed
	case off < 0:
		m.record("ReadAt at the negative offset %d", off)
		return errors.New("nbdtest: negative offset")
	}
	m.reads++
	m.reading++
	return nil
}

func (m *Mem) end() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reading--
}

// record notes a misuse; m.mu is held.
func (m *Mem) record(format string, args ...any) {
	m.misuse = append(m.misuse, fmt.Errorf(format, args...))
}

// Size is the size in bytes.
func (m *Mem) Size() int64 { return m.size }

// BlockSizes implements [nbd.BlockSizer] with the fields; zero values mean the
// defaults.
func (m *Mem) BlockSizes() (minimum, preferred, maxPayload uint32) {
	return m.Min, m.Preferred, m.MaxPayload
}

// Description implements [nbd.Describer] with Text.
func (m *Mem) Description() string { return m.Text }

// Close counts, and records a misuse if it is not the first or comes too
// early.
func (m *Mem) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closes++
	if m.reading > 0 {
		m.record("Close with %d calls of ReadAt under way", m.reading)
	}
	if m.changing > 0 {
		m.record("Close with %d calls of other methods under way", m.changing)
	}
	if m.closes > 1 {
		m.record("Close for the %dth time", m.closes)
		return ErrClosed
	}
	return m.CloseErr
}

// Reads is how often ReadAt was called (and allowed to) up to now.
func (m *Mem) Reads() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.reads
}

// Closes is how often Close was called up to now.
func (m *Mem) Closes() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.closes
}

// Misuse is everything that was done against the contract up to now, nil if
// nothing was. That the device is still open is no misuse; see Closes.
func (m *Mem) Misuse() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return errors.Join(m.misuse...)
}

// Fill writes into p what a device of that seed holds at offset off. Every 8
// bytes are a hash of the seed and their position, so that data from a wrong
// place, or shifted by a byte, never looks right.
func Fill(p []byte, off int64, seed uint64) {
	var word [8]byte
	for len(p) > 0 {
		binary.LittleEndian.PutUint64(word[:], splitmix(seed+uint64(off/8)))
		n := copy(p, word[off%8:])
		p, off = p[n:], off+int64(n)
	}
}

// splitmix is the output function of the SplitMix64 generator.
func splitmix(x uint64) uint64 {
	x = (x + 1) * 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// Bytes are n bytes of what [Fill] makes of the seed, from offset off on.
func Bytes(n int, off int64, seed uint64) []byte {
	p := make([]byte, n)
	Fill(p, off, seed)
	return p
}
