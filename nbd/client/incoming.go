package client

import "io"

const (
	// receiveBuffer is the size of the read buffer in bytes: room for many short replies.
	receiveBuffer = 64 << 10
	// longData is the length in bytes from which on data is read past the buffer: copying so
	// much costs more than a system call.
	longData = 16 << 10
	// shortRead is the most that is read into the buffer while replies have long data, in
	// bytes: the next header, and little of the data behind it, which has to be copied.
	shortRead = 512
)

// incoming reads from the connection and records that something was received. The buffer reads
// from it.
type incoming struct {
	c    *Conn
	most int // of Read, in bytes; used by the goroutine of receive
}

// Read implements io.Reader.
func (r *incoming) Read(p []byte) (int, error) { return r.read(p[:min(len(p), r.most)]) }

// read is Read without the limit.
func (r *incoming) read(p []byte) (int, error) {
	n, err := r.c.nc.Read(p)
	if n > 0 {
		r.c.progress()
	}
	return n, err
}

// readData fills p with data of a reply. Long data is read past the buffer, and the next reply
// probably has long data, too.
func (c *Conn) readData(p []byte) (n int, err error) {
	if len(p) < longData {
		c.incoming.most = receiveBuffer
		return io.ReadFull(c.in, p)
	}
	c.incoming.most = shortRead
	n, err = io.ReadFull(c.in, p[:min(len(p), c.in.Buffered())])
	for n < len(p) && err == nil {
		var more int
		more, err = c.incoming.read(p[n:])
		n += more
	}
	if n == len(p) {
		err = nil // all of it is there; a lasting error comes again
	}
	return n, err
}
