package vhdtest

import (
	"io"
	"maps"
)

// Memory is a Storage in memory that keeps only the sectors that were written. The zero
// value is empty. It is not safe for concurrent use.
type Memory struct {
	sectors map[int64][sector]byte
	size    int64
}

// ReadAt implements io.ReaderAt.
func (m *Memory) ReadAt(p []byte, off int64) (int, error) {
	n := int(max(0, min(int64(len(p)), m.size-off)))
	for done := 0; done < n; {
		b := m.sectors[(off+int64(done))/sector]
		done += copy(p[done:n], b[(off+int64(done))%sector:])
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt implements io.WriterAt.
func (m *Memory) WriteAt(p []byte, off int64) (int, error) {
	if m.sectors == nil {
		m.sectors = make(map[int64][sector]byte)
	}
	for done := 0; done < len(p); {
		at := off + int64(done)
		b := m.sectors[at/sector]
		done += copy(b[at%sector:], p[done:])
		m.sectors[at/sector] = b
	}
	m.size = max(m.size, off+int64(len(p)))
	return len(p), nil
}

// Truncate cuts the storage off at size.
func (m *Memory) Truncate(size int64) {
	maps.DeleteFunc(m.sectors, func(n int64, _ [sector]byte) bool { return n*sector >= size })
	m.size = min(m.size, size)
}

// Size returns the size of the storage in bytes.
func (m *Memory) Size() int64 { return m.size }
