package nbd

import (
	"sync"

	"xapi-nbd/nbd/wire"
)

// replyWriter sends replies, whole ones, one after the other.
type replyWriter struct {
	c *conn

	mu  sync.Mutex // guards err and the order of bytes on the wire
	err error      // the first failure; nothing is sent after it
}

// send writes one whole reply. After the first failure the connection is dead
// and its reader wakes.
func (w *replyWriter) send(message []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return
	}
	if err := w.c.write(message); err != nil {
		w.err = err
		w.c.kill(hardDisconnect("cannot send a reply", err))
	}
}

// sendErrno answers a request with an error, or with a success that has no
// data.
func (w *replyWriter) sendErrno(cookie uint64, errno wire.Errno) {
	var b [wire.SimpleReplyLen]byte
	wire.PutSimpleReply(&b, errno, cookie)
	w.send(b[:])
}

// sendRead answers a READ whose n bytes are in the buffer.
func (w *replyWriter) sendRead(cookie uint64, b *buffer, n int) {
	message := b.message(wire.SimpleReplyLen, n)
	wire.PutSimpleReply((*[wire.SimpleReplyLen]byte)(message), wire.Success, cookie)
	w.send(message)
}
