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

// Mem is a device with known content that records calls against the contract of
// [nbd.Device]. The fields must not change once it is in use. The methods may be called
// concurrently.
type Mem struct {
	// Min, Preferred and MaxPayload are the results of BlockSizes, in bytes.
	Min, Preferred, MaxPayload uint32
	// Text is the result of Description.
	Text string
	// CloseErr is the result of the first Close.
	CloseErr error

	size int64
	fill func(p []byte, off int64)

	mu       sync.Mutex // guards the fields below
	reads    int
	reading  int
	changing int // running calls of the other methods of a RAM
	closes   int
	misuse   []error
}

// NewMem returns a device of size bytes with the content of [Fill] for the seed. The content
// is computed when it is read, so size may be larger than memory.
func NewMem(size int64, seed uint64) *Mem {
	return &Mem{size: size, fill: func(p []byte, off int64) { Fill(p, off, seed) }}
}

// MemOf returns a device with this content, which must not be changed.
func MemOf(content []byte) *Mem {
	return &Mem{size: int64(len(content)), fill: func(p []byte, off int64) { copy(p, content[off:]) }}
}

// ErrClosed is the error of reads after Close.
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

// record records a misuse; m.mu is held.
func (m *Mem) record(format string, args ...any) {
	m.misuse = append(m.misuse, fmt.Errorf(format, args...))
}

// Size returns the size in bytes.
func (m *Mem) Size() int64 { return m.size }

// BlockSizes implements [nbd.BlockSizer] and returns the fields.
func (m *Mem) BlockSizes() (minimum, preferred, maxPayload uint32) {
	return m.Min, m.Preferred, m.MaxPayload
}

// Description implements [nbd.Describer] and returns Text.
func (m *Mem) Description() string { return m.Text }

// Close counts its calls. It records a misuse if it is not the first one, or if another call
// is running.
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

// Reads returns the number of calls of ReadAt up to now, without misuses.
func (m *Mem) Reads() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.reads
}

// Closes returns the number of calls of Close up to now.
func (m *Mem) Closes() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.closes
}

// Misuse returns an error with all calls against the contract up to now, nil if there were
// none. A device that has not been closed is no misuse; see Closes.
func (m *Mem) Misuse() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return errors.Join(m.misuse...)
}

// Fill writes the content of a device with this seed at offset off into p. Every 8 bytes are
// a hash of the seed and their position, so data of another position, or shifted by a byte,
// differs.
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

// Bytes returns n bytes of the content of [Fill] for the seed, from offset off.
func Bytes(n int, off int64, seed uint64) []byte {
	p := make([]byte, n)
	Fill(p, off, seed)
	return p
}
