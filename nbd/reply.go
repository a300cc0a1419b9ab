package nbd

import (
	"encoding/binary"
	"net"

	"xapi-nbd/nbd/internal/zerocopy"
	"xapi-nbd/nbd/wire"
)

// replyWriter sends replies in the form that was negotiated, one after the other. Its
// methods may be called concurrently.
type replyWriter struct {
	c      *conn
	mode   replyMode
	sender *zerocopy.Sender // nil if all data has to be read to memory

	sending sendLock // guards the fields below and the order of bytes on the wire
	err     error    // the first error; nothing is sent after it
	header  [headerRoom]byte
	pieces  net.Buffers // memory for sendSparse
	unsent  net.Buffers // the part of pieces that has not been sent
}

// sendLock is a mutex whose holder may wait for the peer. It is a channel because in tests
// with synctest a goroutine that waits for a sync.Mutex does not count as blocked.
type sendLock chan struct{}

func newSendLock() sendLock { return make(sendLock, 1) }

func (l sendLock) lock()   { l <- struct{}{} }
func (l sendLock) unlock() { <-l }

// send sends one reply. After an error nothing more is sent, and the connection is closed.
func (w *replyWriter) send(message []byte) {
	w.sending.lock()
	defer w.sending.unlock()
	if w.err == nil {
		w.failedWith(w.c.write(message))
	}
}

// failedWith records the result of sending. w.sending is held.
func (w *replyWriter) failedWith(err error) {
	if err != nil {
		w.err = err
		w.c.kill(hardDisconnect("cannot send a reply", err))
	}
}

// sendResult sends an error, or a success without data.
func (w *replyWriter) sendResult(req wire.Request, errno wire.Errno) {
	if errno != wire.Success {
		w.c.srv.view.errors.add(errno)
	}
	if w.mode == simpleReplies {
		var b [wire.SimpleReplyLen]byte
		wire.PutSimpleReply(&b, errno, req.Cookie)
		w.send(b[:])
		return
	}
	b := make([]byte, 0, headerRoom)
	if errno == wire.Success {
		w.send(w.appendChunk(b, req, wire.ChunkNone, wire.ChunkFlagDone, 0))
		return
	}
	failure := wire.ChunkFailure{Errno: errno}.Append(nil, wire.ChunkError)
	b = w.appendChunk(b, req, wire.ChunkError, wire.ChunkFlagDone, uint64(len(failure)))
	w.send(append(b, failure...))
}

// sendRead sends the reply to a READ whose n bytes are in the buffer. The header is put in
// front of the data, so that both are sent in one write.
func (w *replyWriter) sendRead(req wire.Request, b *buffer, n int) {
	if n == 0 && w.mode != simpleReplies {
		w.sendResult(req, wire.Success) // a content chunk must not be empty
		return
	}
	h := w.dataHeaderLen()
	message := b.message(h, n)
	w.appendDataHeader(message[:0], req, wire.ChunkFlagDone, req.Offset, n)
	w.send(message)
}

// sendPipes sends the reply to a READ whose data is in pipes.
func (w *replyWriter) sendPipes(req wire.Request, data *zerocopy.Pipes) {
	w.sending.lock()
	defer w.sending.unlock()
	if w.err != nil {
		return
	}
	header := w.appendDataHeader(w.header[:0], req, wire.ChunkFlagDone, req.Offset, data.Len())
	w.failedWith(w.c.writeSpliced(w.sender, header, data))
}

// dataHeaderLen returns the length of the header that appendDataHeader appends.
func (w *replyWriter) dataHeaderLen() int {
	if w.mode == simpleReplies {
		return wire.SimpleReplyLen
	}
	return w.chunkLen() + wire.ChunkOffsetLen
}

// appendDataHeader appends the header for n bytes of data at off.
func (w *replyWriter) appendDataHeader(b []byte, req wire.Request, flags wire.ChunkFlags, off uint64, n int) []byte {
	if w.mode == simpleReplies {
		var h [wire.SimpleReplyLen]byte
		wire.PutSimpleReply(&h, wire.Success, req.Cookie)
		return append(b, h[:]...)
	}
	b = w.appendChunk(b, req, wire.ChunkOffsetData, flags, wire.ChunkOffsetLen+uint64(n))
	return appendUint64(b, off)
}

// sendSparse sends the reply to a READ whose zeroes are not in the buffer: with one chunk
// for each part, or as a simple reply with zeroes from elsewhere.
func (w *replyWriter) sendSparse(req wire.Request, b *buffer, parts []readPart) {
	w.sending.lock()
	defer w.sending.unlock()
	if w.err != nil {
		return
	}
	if w.mode == simpleReplies {
		w.pieces = w.appendWhole(w.pieces[:0], req, b, parts)
	} else {
		w.pieces = w.appendSparse(w.pieces[:0], req, b, parts)
	}
	w.unsent = w.pieces
	w.failedWith(w.c.writePieces(&w.unsent))
	clear(w.pieces) // the buffer is used again
}

// zeroPiece is sent for zeroes in simple replies, as often as needed. It stays in the
// processor's cache, so that sending it is faster than clearing and sending a buffer.
var zeroPiece [64 << 10]byte

// appendWhole appends the pieces of a simple reply.
func (w *replyWriter) appendWhole(pieces net.Buffers, req wire.Request, b *buffer, parts []readPart) net.Buffers {
	pieces = append(pieces, w.appendDataHeader(w.header[:0], req, 0, 0, 0))
	for _, p := range parts {
		if at := int(p.off - int64(req.Offset)); !p.zero {
			pieces = append(pieces, b.from(at, at+int(p.n)))
			continue
		}
		for n := p.n; n > 0; n -= int64(len(zeroPiece)) {
			pieces = append(pieces, zeroPiece[:min(n, int64(len(zeroPiece)))])
		}
	}
	return pieces
}

// appendSparse appends the chunks of the reply that sendSparse sends. The header of a chunk
// with data is written into the zeroes before it in the buffer, which are not sent and are
// long enough. So each piece that is sent is a part of the buffer, and nothing is copied.
func (w *replyWriter) appendSparse(pieces net.Buffers, req wire.Request, b *buffer, parts []readPart) net.Buffers {
	var room [3 * headerRoom]byte
	headers := room[:0] // headers of holes that are not part of a piece yet
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
		pieces, headers = append(pieces, piece), room[:0]
	}
	if len(headers) > 0 {
		pieces = append(pieces, headers)
	}
	return pieces
}

// chunkLen returns the length of the header of a chunk, in bytes.
func (w *replyWriter) chunkLen() int {
	if w.mode == extendedHeaders {
		return wire.ExtendedChunkLen
	}
	return wire.ChunkLen
}

// appendChunk appends the header of a chunk with a payload of n bytes.
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

// appendStatus appends a chunk with the extents of one context.
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
