package client

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"xapi-nbd/nbd/wire"
)

// maxEmptyChunks is how many chunks without content one reply may have. A server needs one,
// or one for every part that it could not read.
const maxEmptyChunks = 1 << 16

// receiveOne reads one simple reply, or one chunk of a structured reply.
func (c *Conn) receiveOne() error {
	if c.mode == extendedHeaders {
		var b [wire.ExtendedChunkLen]byte
		if err := c.receiveHeader(b[:]); err != nil {
			return err
		}
		chunk, err := wire.ParseExtendedChunk(&b)
		if err != nil {
			return err
		}
		return c.receiveChunk(chunk)
	}
	structured, err := c.isStructured()
	if err != nil {
		return err
	}
	if !structured {
		return c.receiveSimple()
	}
	var b [wire.ChunkLen]byte
	if err := c.receiveHeader(b[:]); err != nil {
		return err
	}
	chunk, err := wire.ParseChunk(&b)
	if err != nil {
		return err
	}
	return c.receiveChunk(chunk)
}

// isStructured reports whether the next reply is structured, by its magic number. It
// reports false for an unknown magic: the parser of simple replies fails on that with an
// error that names it.
func (c *Conn) isStructured() (bool, error) {
	if c.mode == simpleReplies {
		return false, nil
	}
	b, err := c.in.Peek(4)
	if err != nil {
		return false, lost(false, err)
	}
	return binary.BigEndian.Uint32(b) == wire.MagicStructuredReply, nil
}

// receiveHeader fills b with the header of a reply.
func (c *Conn) receiveHeader(b []byte) error {
	if _, err := io.ReadFull(c.in, b); err != nil {
		return lost(false, err)
	}
	return nil
}

// receiveSimple reads a simple reply, section "Simple reply message".
func (c *Conn) receiveSimple() error {
	var b [wire.SimpleReplyLen]byte
	if err := c.receiveHeader(b[:]); err != nil {
		return err
	}
	reply, err := wire.ParseSimpleReply(&b)
	if err != nil {
		return err
	}
	call, err := c.callOf(reply.Cookie)
	switch {
	case err != nil:
		return err
	case call.req.Command == wire.CmdRead && c.mode != simpleReplies:
		return errors.New("server answered NBD_CMD_READ with a simple reply although structured replies were negotiated")
	case reply.Errno != wire.Success:
		c.finish(call, &Error{Op: call.req.Command.String(), Errno: reply.Errno.Known()})
		return nil
	case call.req.Command == wire.CmdRead:
		if err := c.fill(call, 0, call.req.Length); err != nil {
			return err
		}
	case call.req.Command == wire.CmdBlockStatus:
		c.finish(call, errors.New("NBD_CMD_BLOCK_STATUS: server answered without a status"))
		return nil
	}
	c.finish(call, nil)
	return nil
}

// receiveChunk reads the payload of a chunk, section "Structured reply chunk message". A
// chunk that violates the protocol ends the connection, because client and server may
// disagree about where the next one begins. Unknown flags are ignored.
func (c *Conn) receiveChunk(chunk wire.Chunk) error {
	call, err := c.callOf(chunk.Cookie)
	if err != nil {
		return err
	}
	if c.mode == extendedHeaders && chunk.Offset != call.req.Offset {
		return fmt.Errorf("%v: server answered a request at %d, which was made at %d", call.req.Command, chunk.Offset, call.req.Offset)
	}
	if err := c.receivePayload(call, chunk); err != nil {
		return fmt.Errorf("%v: %w", call.req.Command, err)
	}
	if chunk.Flags&wire.ChunkFlagDone != 0 {
		c.finish(call, call.result())
	}
	return nil
}

// receivePayload reads the payload of a chunk of any type.
func (c *Conn) receivePayload(call *call, chunk wire.Chunk) error {
	switch {
	case chunk.Type == wire.ChunkOffsetData || chunk.Type == wire.ChunkOffsetHole:
		return c.receiveContent(call, chunk)
	case chunk.Type == wire.ChunkBlockStatus && c.mode != extendedHeaders, chunk.Type == wire.ChunkBlockStatusExt && c.mode == extendedHeaders:
		return c.receiveStatus(call, chunk)
	case chunk.Type != wire.ChunkNone && !chunk.Type.IsError():
		return fmt.Errorf("server sent an unknown chunk, %v", chunk.Type)
	}
	if call.emptyChunks++; call.emptyChunks > maxEmptyChunks {
		return fmt.Errorf("endless chunks, more than %d without content", maxEmptyChunks)
	}
	if chunk.Type.IsError() {
		return c.receiveFailure(call, chunk)
	}
	if chunk.Length != 0 || chunk.Flags&wire.ChunkFlagDone == 0 {
		return fmt.Errorf("malformed %v of %d bytes, flags %v", chunk.Type, chunk.Length, chunk.Flags)
	}
	return nil
}

// receiveContent reads a chunk of data, or a hole, into the buffer of the READ. It fails if
// the server sends bytes outside the request, or twice.
func (c *Conn) receiveContent(call *call, chunk wire.Chunk) error {
	var b [wire.ChunkHoleLen]byte
	head := b[:wire.ChunkOffsetLen]
	if chunk.Type == wire.ChunkOffsetHole {
		head = b[:]
	}
	switch {
	case call.req.Command != wire.CmdRead:
		return fmt.Errorf("server answered with %v", chunk.Type)
	case chunk.Type == wire.ChunkOffsetData && chunk.Length <= wire.ChunkOffsetLen,
		chunk.Type == wire.ChunkOffsetHole && chunk.Length != wire.ChunkHoleLen:
		return fmt.Errorf("malformed %v of %d bytes", chunk.Type, chunk.Length)
	}
	if _, err := io.ReadFull(c.in, head); err != nil {
		return lost(true, err)
	}
	offset, n := binary.BigEndian.Uint64(head), chunk.Length-wire.ChunkOffsetLen
	if chunk.Type == wire.ChunkOffsetHole {
		hole, length, err := wire.ParseHole(head)
		if err != nil {
			return err
		}
		offset, n = hole, uint64(length)
	}
	if offset < call.req.Offset || n > call.req.Length || offset-call.req.Offset > call.req.Length-n {
		return fmt.Errorf("server sent %d bytes at %d, outside the request for %d at %d", n, offset, call.req.Length, call.req.Offset)
	}
	at := offset - call.req.Offset
	if err := call.received.add(at, at+n); err != nil {
		return fmt.Errorf("server sent %d bytes at %d: %w", n, offset, err)
	}
	if chunk.Type == wire.ChunkOffsetData {
		return c.fill(call, at, n)
	}
	if p := c.beginFill(call); p != nil {
		clear(p[at : at+n])
		c.endFill(call)
	}
	return nil
}

// receiveFailure reads an error chunk. The first one of a reply is the error of the request.
// A chunk of an unknown type, as long as its number says that it is an error, makes the
// request fail too.
func (c *Conn) receiveFailure(call *call, chunk wire.Chunk) error {
	const fixed = 4 + 2 // errno and length of the text
	known := chunk.Type == wire.ChunkError || chunk.Type == wire.ChunkErrorOffset
	parsed := min(chunk.Length, fixed)
	switch {
	case known && chunk.Length > fixed+wire.MaxString+8, chunk.Length > wire.DefaultMaxPayload:
		return fmt.Errorf("%v of %d bytes is too long", chunk.Type, chunk.Length)
	case known:
		parsed = chunk.Length
	}
	payload := make([]byte, parsed)
	if _, err := io.ReadFull(c.in, payload); err != nil {
		return lost(true, err)
	}
	f, err := wire.ParseChunkFailure(chunk.Type, payload)
	switch {
	case !known && err != nil:
		f.Errno = wire.EINVAL
	case err != nil:
		return err
	}
	var failure error = &Error{Op: call.req.Command.String(), Errno: f.Errno.Known(), Text: wire.ProtocolString(f.Text)}
	if chunk.Type == wire.ChunkErrorOffset {
		if f.Offset < call.req.Offset || f.Offset-call.req.Offset >= call.req.Length {
			return fmt.Errorf("server failed at %d, outside the request for %d bytes at %d", f.Offset, call.req.Length, call.req.Offset)
		}
		failure = &OffsetError{Offset: int64(f.Offset), Err: failure}
	}
	if call.failure == nil {
		call.failure = failure
	}
	return c.skip(chunk.Length - parsed)
}

// result returns the error of a request after its last chunk, or nil. A reply without all
// of the data is a failure.
func (call *call) result() error {
	switch {
	case call.failure != nil:
		return call.failure
	case call.req.Command == wire.CmdRead && !call.received.covers(call.req.Length):
		return fmt.Errorf("NBD_CMD_READ: server sent an incomplete reply, %d of %d bytes", call.received.total(), call.req.Length)
	case call.req.Command == wire.CmdBlockStatus:
		return call.status.result()
	}
	return nil
}
