package sock

import (
	"net"
	"sync"
)

// Batch is a [net.Conn] that can collect writes and send them together. It is for the
// connection below TLS: crypto/tls calls Write once for each record of 16 KiB, and copying
// the records of a long message into one buffer costs less than a system call for each.
//
// Its methods may be called concurrently, except for Begin and End, which one goroutine
// calls in turn.
type Batch struct {
	net.Conn

	mu  sync.Mutex // guards the fields below
	buf *[]byte    // nil unless writes are being collected
	err error      // the first error of a write; bytes are missing after it
}

// batchSize is how many bytes are collected before they are sent. A larger batch would
// delay the peer: it processes one part of a message while the next is being encrypted.
const batchSize = 256 << 10

var buffers = sync.Pool{New: func() any {
	b := make([]byte, 0, batchSize)
	return &b
}}

// NewBatch returns a Batch that writes to nc and reads from it.
func NewBatch(nc net.Conn) *Batch { return &Batch{Conn: nc} }

// Begin starts to collect writes. The caller must call End before the next Begin.
func (b *Batch) Begin() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.buf = buffers.Get().(*[]byte)
}

// End sends the bytes that were collected. Later writes are sent at once. It returns the
// first error of any write.
func (b *Batch) End() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.flush()
	buffers.Put(b.buf)
	b.buf = nil
	return b.err
}

// Write implements [net.Conn]. After an error it writes nothing.
func (b *Batch) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.buf == nil && b.err == nil {
		var n int
		n, b.err = b.Conn.Write(p)
		return n, b.err
	}
	if b.buf != nil && len(*b.buf)+len(p) > batchSize {
		b.flush()
	}
	if b.err != nil {
		return 0, b.err
	}
	*b.buf = append(*b.buf, p...)
	return len(p), nil
}

// flush sends the bytes that were collected; b.mu is held.
func (b *Batch) flush() {
	if b.err == nil && len(*b.buf) > 0 {
		_, b.err = b.Conn.Write(*b.buf)
	}
	*b.buf = (*b.buf)[:0]
}

// Failed reports whether a write failed. The peer may then have received the beginning
// of a record without its end.
func (b *Batch) Failed() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err != nil
}
