package nbd

import (
	"encoding/binary"
	"sync"
	"sync/atomic"

	"xapi-nbd/nbd/wire"
)

// replyWriter sends replies, whole ones, one after the other, in the form that
// was negotiated.
type replyWriter struct {
	c       *conn
	mode    replyMode
	splicer *splicer // nil where data has to pass through memory

	waiting atomic.Bool // pending is not nil
	wanted  atomic.Bool // whoever is sending should flush when done

	sending sendLock // guards what follows and the order of bytes on the wire
	err     error    // the first failure; nothing is sent after it
	pending *[]byte  // short replies that are ready and may wait for others
	header  [headerRoom]byte
}

// sendLock is a mutex whose holder waits for the peer. Tests with a clock of
// their own must see that who waits for the lock waits for the peer too, which
// they do not see of a sync.Mutex.
type sendLock chan struct{}

func newSendLock() sendLock { return make(sendLock, 1) }

func (l sendLock) lock()   { l <- struct{}{} }
func (l sendLock) unlock() { <-l }

func (l sendLock) tryLock() bool {
	select {
	case l <- struct{}{}:
		return true
	default:
		return false
	}
}

// maxPending bounds the replies that wait to leave together. It is one record of
// TLS: no header must be cut in two by the end of a record, because there are
// clients that take a short read for an error.
const maxPending = 16 << 10

var pendings = sync.Pool{New: func() any {
	b := make([]byte, 0, maxPending)
	return &b
}}

// send sends one whole reply. With more, others are about to be ready: a short
// one may wait for them, until the next flush. After the first failure the
// connection is dead and its reader wakes.
func (w *replyWriter) send(message []byte, more bool) {
	w.sending.lock()
	defer w.unlock()
	if w.pending == nil && !more {
		w.write(message)
		return
	}
	if w.pending != nil && len(*w.pending)+len(message) > maxPending {
		w.flushPending()
	}
	if len(message) > maxPending {
		w.write(message)
		return
	}
	if w.pending == nil {
		w.pending = pendings.Get().(*[]byte)
		w.waiting.Store(true)
	}
	*w.pending = append(*w.pending, message...)
	if !more {
		w.flushPending()
	}
}

// flush sends the replies that wait. While somebody else is sending it leaves
// that to him and does not wait.
func (w *replyWriter) flush() {
	if w.waiting.Load() {
		w.wanted.Store(true)
		w.serveWanted()
	}
}

// unlock ends a turn of sending.
func (w *replyWriter) unlock() {
	w.sending.unlock()
	w.serveWanted()
}

// serveWanted flushes if somebody wants that and nobody is sending: who holds
// the lock looks again after giving it back.
func (w *replyWriter) serveWanted() {
	for w.wanted.Load() && w.sending.tryLock() {
		w.wanted.Store(false)
		w.flushPending()
		w.sending.unlock()
	}
}

// finish sends the replies that wait, in any case.
func (w *replyWriter) finish() {
	w.sending.lock()
	defer w.sending.unlock()
	w.flushPending()
}

// flushPending is flush for whoever is sending.
func (w *replyWriter) flushPending() {
	if w.pending == nil {
		return
	}
	w.write(*w.pending)
	*w.pending = (*w.pending)[:0]
	pendings.Put(w.pending)
	w.pending = nil
	w.waiting.Store(false)
}

// write writes to the connection, for whoever is sending.
func (w *replyWriter) write(b []byte) {
	if w.err == nil {
		w.failedWith(w.c.write(b))
	}
}

func (w *replyWriter) failedWith(err error) {
	if err != nil {
		w.err = err
		w.c.kill(hardDisconnect("cannot send a reply", err))
	}
}

// sendResult answers a request with an error, or with a success that has no
// data.
func (w *replyWriter) sendResult(req wire.Request, errno wire.Errno) {
	if errno != wire.Success {
		w.c.srv.view.errors.add(errno)
	}
	if w.mode == simpleReplies {
		var b [wire.SimpleReplyLen]byte
		wire.PutSimpleReply(&b, errno, req.Cookie)
		w.send(b[:], false)
		return
	}
	b := make([]byte, 0, headerRoom)
	if errno == wire.Success {
		w.send(w.appendChunk(b, req, wire.ChunkNone, wire.ChunkFlagDone, 0), false)
		return
	}
	failure := wire.ChunkFailure{Errno: errno}.Append(nil, wire.ChunkError)
	b = w.appendChunk(b, req, wire.ChunkError, wire.ChunkFlagDone, uint64(len(failure)))
	w.send(append(b, failure...), false)
}

// sendRead answers a READ whose n bytes are in the buffer: header and data are
// next to each other there and leave in one write.
func (w *replyWriter) sendRead(req wire.Request, b *buffer, n int, more bool) {
	if n == 0 && w.mode != simpleReplies {
		w.sendResult(req, wire.Success) // a content chunk must not be empty
		return
	}
	h := w.dataHeaderLen()
	message := b.message(h, n)
	w.appendDataHeader(message[:0], req, wire.ChunkFlagDone, req.Offset, n)
	w.send(message, more)
}

// sendPipes answers a READ whose data is in pipes.
func (w *replyWriter) sendPipes(req wire.Request, data *pipeline) {
	w.sending.lock()
	defer w.unlock()
	w.flushPending()
	if w.err != nil {
		return
	}
	header := w.appendDataHeader(w.header[:0], req, wire.ChunkFlagDone, req.Offset, data.n)
	w.failedWith(w.c.writeSpliced(w.splicer, header, data))
}

// dataHeaderLen is how long what appendDataHeader appends is.
func (w *replyWriter) dataHeaderLen() int {
	if w.mode == simpleReplies {
		return wire.SimpleReplyLen
	}
	return w.chunkLen() + wire.ChunkOffsetLen
}

// appendDataHeader appends what stands in front of n bytes of data at off.
func (w *replyWriter) appendDataHeader(b []byte, req wire.Request, flags wire.ChunkFlags, off uint64, n int) []byte {
	if w.mode == simpleReplies {
		var h [wire.SimpleReplyLen]byte
		wire.PutSimpleReply(&h, wire.Success, req.Cookie)
		return append(b, h[:]...)
	}
	b = w.appendChunk(b, req, wire.ChunkOffsetData, flags, wire.ChunkOffsetLen+uint64(n))
	return appendUint64(b, off)
}

// sendSparse answers a READ by one chunk for each part. The data is where it
// belongs in the buffer, and each chunk's header is written into the hole before
// it, which is long enough and is not sent. So the pieces that leave, one for
// each part with data, are parts of the buffer.
func (w *replyWriter) sendSparse(req wire.Request, b *buffer, parts []readPart) {
	var pieces [maxReadParts][]byte
	n := 0
	var headers []byte // of holes that no piece has taken up yet
	var room [3 * headerRoom]byte
	headers = room[:0]
	for i, p := range parts {
		flags := wire.ChunkFlags(0)
		if i == len(parts)-1 {
			flags = wire.ChunkFlagDone
		}
		at := int(p.off - int64(req.Offset))
		if p.zero {
			headers = w.appendChunk(headers, req, wire.ChunkOffsetHole, flags, wire.ChunkHoleLen)
			headers = wire.AppendHole(headers, uint64(p.off), uint32(p.n))
			continue
		}
		headers = w.appendDataHeader(headers, req, flags, uint64(p.off), int(p.n))
		piece := b.from(at-len(headers), at+int(p.n))
		copy(piece, headers)
		pieces[n] = piece
		n, headers = n+1, room[:0]
	}
	if len(headers) > 0 {
		pieces[n] = headers
		n++
	}
	w.sendPieces(pieces[:n])
}

// sendPieces sends one reply that consists of several.
func (w *replyWriter) sendPieces(pieces [][]byte) {
	w.sending.lock()
	defer w.unlock()
	w.flushPending()
	if w.err == nil {
		w.failedWith(w.c.writeAll(pieces))
	}
}

// chunkLen is the length of a chunk's header in bytes.
func (w *replyWriter) chunkLen() int {
	if w.mode == extendedHeaders {
		return wire.ExtendedChunkLen
	}
	return wire.ChunkLen
}

// appendChunk appends a chunk's header for a payload of n bytes.
func (w *replyWriter) appendChunk(b []byte, req wire.Request, typ wire.ChunkType, flags wire.ChunkFlags, n uint64) []byte {
	c := wire.Chunk{Flags: flags, Type: typ, Cookie: req.Cookie, Offset: req.Offset, Length: n}
	if w.mode == extendedHeaders {
		var h [wire.ExtendedChunkLen]byte
		wire.PutExtendedChunk(&h, c)
		return append(b, h[:]...)
	}
	var h [wire.ChunkLen]byte
	wire.PutChunk(&h, c)
	return append(b, h[:]...)
}

// appendStatus appends a chunk that tells the extents of one context.
func (w *replyWriter) appendStatus(b []byte, req wire.Request, flags wire.ChunkFlags, id uint32, extents []wire.Extent) []byte {
	if w.mode == extendedHeaders {
		n := 8 + uint64(len(extents))*wire.ExtendedExtentLen
		b = w.appendChunk(b, req, wire.ChunkBlockStatusExt, flags, n)
		return wire.AppendBlockStatusExt(b, id, extents)
	}
	n := 4 + uint64(len(extents))*wire.ExtentLen
	b = w.appendChunk(b, req, wire.ChunkBlockStatus, flags, n)
	return wire.AppendBlockStatus(b, id, extents)
}

func appendUint64(b []byte, v uint64) []byte { return binary.BigEndian.AppendUint64(b, v) }
