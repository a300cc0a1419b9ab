package nbd

import (
	"encoding/binary"
	"sync"

	"xapi-nbd/nbd/wire"
)

// replyWriter sends replies, whole ones, one after the other, in the form that
// was negotiated.
type replyWriter struct {
	c    *conn
	mode replyMode

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

// sendResult answers a request with an error, or with a success that has no
// data.
func (w *replyWriter) sendResult(req wire.Request, errno wire.Errno) {
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

// sendRead answers a READ whose n bytes are in the buffer: header and data are
// next to each other there and leave in one write.
func (w *replyWriter) sendRead(req wire.Request, b *buffer, n int) {
	if w.mode == simpleReplies {
		message := b.message(wire.SimpleReplyLen, n)
		wire.PutSimpleReply((*[wire.SimpleReplyLen]byte)(message), wire.Success, req.Cookie)
		w.send(message)
		return
	}
	if n == 0 {
		w.sendResult(req, wire.Success) // a content chunk must not be empty
		return
	}
	message := b.message(w.chunkLen()+wire.ChunkOffsetLen, n)
	header := w.appendChunk(message[:0], req, wire.ChunkOffsetData, wire.ChunkFlagDone, wire.ChunkOffsetLen+uint64(n))
	appendUint64(header, req.Offset)
	w.send(message)
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

// sparseLen is the length of the answer to a READ in parts.
func (w *replyWriter) sparseLen(parts []readPart) int {
	n := 0
	for _, p := range parts {
		n += w.chunkLen() + wire.ChunkHoleLen
		if !p.zero {
			n += int(p.n)
		}
	}
	return n
}

func appendUint64(b []byte, v uint64) []byte { return binary.BigEndian.AppendUint64(b, v) }
