package nbd

import (
	"net"
	"sync"
)

// batchConn is what TLS writes to. crypto/tls makes one call for each record of
// 16 KiB; while a long reply is being sent they are collected, which costs a
// copy and saves many more system calls than that.
type batchConn struct {
	net.Conn

	mu  sync.Mutex // TLS may also write while it reads
	buf *[]byte    // nil while nothing is collected
	err error      // of a write: what was to be sent is lost, or a part of it
}

// tlsRecord is the most data that one record of TLS holds.
const tlsRecord = 16 << 10

// batchSize is how much is collected. More would keep the peer waiting: it works
// on what it has got while the next part is being encrypted.
const batchSize = 256 << 10

var batches = sync.Pool{New: func() any {
	b := make([]byte, 0, batchSize)
	return &b
}}

// begin starts collecting. Not to be called again before end.
func (b *batchConn) begin() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.buf = batches.Get().(*[]byte)
}

// end sends what was collected, and the rest at once from now on.
func (b *batchConn) end() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.flush()
	batches.Put(b.buf)
	b.buf = nil
	return b.err
}

// Write implements net.Conn.
func (b *batchConn) Write(p []byte) (int, error) {
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

func (b *batchConn) flush() {
	if b.err == nil && len(*b.buf) > 0 {
		_, b.err = b.Conn.Write(*b.buf)
	}
	*b.buf = (*b.buf)[:0]
}

// isBroken reports whether a write failed, so that the peer may have got the
// beginning of a record without its end.
func (b *batchConn) isBroken() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err != nil
}
