package client

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"iter"

	"xapi-nbd/nbd/wire"
)

// maxStatusExtents is the largest number of extents in one reply, section
// "NBD_REPLY_TYPE_BLOCK_STATUS".
const maxStatusExtents = 1 << 20

// BlockStatus returns the status of the n bytes from off on in a metadata context, section
// "NBD_CMD_BLOCK_STATUS"; n must be above 0. The context must be one of
// [Conn.MetaContexts], otherwise the error matches [ErrUnsupported].
//
// The first extent begins at off, and each of the others at the end of the one before it.
// There is at least one. Together they cover n bytes or less, because a server may reply for
// the first part only: [Conn.Extents] asks until it has the whole range. Status bits that
// the context does not define are returned as they are.
//
// BlockStatus sends one request, for whole blocks if the server has a minimum block size. If
// the reply ends in the first block and before off, which the protocol forbids, the rest of
// that block is reported as data in base:allocation, which is always safe; in other contexts
// that is an error.
func (c *Conn) BlockStatus(ctx context.Context, metaContext string, off, n int64) ([]wire.Extent, error) {
	id, ok := c.contexts.id(metaContext)
	if !ok {
		return nil, fmt.Errorf("%v: metadata context %q is %w", wire.CmdBlockStatus, metaContext, ErrUnsupported)
	}
	if err := c.inside(wire.CmdBlockStatus, off, n); err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, fmt.Errorf("%v: a range of 0 bytes: %w", wire.CmdBlockStatus, wire.EINVAL)
	}
	unit, _ := c.constraints()
	begin, end := c.widen(off, off+n, unit)
	length := min(end-begin, c.lengthLimit())
	r := wire.Request{Command: wire.CmdBlockStatus, Offset: uint64(begin), Length: uint64(length)}
	call := &call{req: r, status: statusCollector{want: id}}
	if err := c.roundTrip(ctx, call, nil); err != nil {
		return nil, err
	}
	cut := cutExtents(call.status.extents, uint64(off-begin), uint64(n))
	switch {
	case cut != nil:
		return cut, nil
	case metaContext == wire.BaseAllocation:
		return []wire.Extent{{Length: uint64(min(begin+unit-off, n))}}, nil
	}
	return nil, fmt.Errorf("%v: server sent no status of the range", wire.CmdBlockStatus)
}

// Extents iterates over the status of the n bytes from off on in a metadata context. It calls
// [Conn.BlockStatus] until it has the whole range, so the extents cover exactly n bytes;
// two extents in a row may have the same status. An error is the last value, beside an
// empty extent.
func (c *Conn) Extents(ctx context.Context, metaContext string, off, n int64) iter.Seq2[wire.Extent, error] {
	return func(yield func(wire.Extent, error) bool) {
		for end := off + n; off < end; {
			extents, err := c.BlockStatus(ctx, metaContext, off, end-off)
			if err != nil {
				yield(wire.Extent{}, err)
				return
			}
			for _, e := range extents {
				if !yield(e, nil) {
					return
				}
				off += int64(e.Length)
			}
		}
	}
}

// cutExtents removes the first before bytes of the extents, and all bytes after the n bytes
// that follow. It returns nil if nothing is left.
func cutExtents(extents []wire.Extent, before, n uint64) (cut []wire.Extent) {
	for _, e := range extents {
		skipped := min(before, e.Length)
		before -= skipped
		e.Length = min(e.Length-skipped, n)
		n -= e.Length
		if e.Length > 0 {
			cut = append(cut, e)
		}
	}
	return cut
}

// statusCollector collects the status chunks of one reply.
type statusCollector struct {
	want    uint32          // the id of the context that the caller asked for
	seen    map[uint32]bool // the ids of the contexts whose status has arrived
	extents []wire.Extent
	problem error // why the request fails
}

// receiveStatus reads a status chunk. The status of other contexts is dropped.
func (c *Conn) receiveStatus(call *call, chunk wire.Chunk) error {
	head, size := uint64(4), uint64(wire.ExtentLen)
	if chunk.Type == wire.ChunkBlockStatusExt {
		head, size = 8, wire.ExtendedExtentLen
	}
	switch {
	case call.req.Command != wire.CmdBlockStatus:
		return fmt.Errorf("server answered with %v", chunk.Type)
	case chunk.Length < head+size || (chunk.Length-head)%size != 0:
		return fmt.Errorf("malformed %v of %d bytes", chunk.Type, chunk.Length)
	case chunk.Length > head+maxStatusExtents*size:
		return fmt.Errorf("%v of %d bytes is too long", chunk.Type, chunk.Length)
	}
	b, err := c.in.Peek(4)
	if err != nil {
		return lost(true, err)
	}
	if !call.status.accept(c.contexts, binary.BigEndian.Uint32(b)) {
		return c.skip(chunk.Length)
	}
	c.incoming.most = receiveBuffer // for a long reply in few reads
	// The buffer grows with the bytes that arrive, not with the announced length.
	var payload bytes.Buffer
	if _, err := io.CopyN(&payload, c.in, int64(chunk.Length)); err != nil {
		return lost(true, err)
	}
	_, call.status.extents, err = wire.ParseBlockStatus(chunk.Type, payload.Bytes())
	return err
}

// accept records that the status of a context has arrived, and reports whether it is the
// context that the caller asked for. A second chunk for a context, or one for a context that
// was not granted, makes the request fail: the other extents may be wrong too.
func (s *statusCollector) accept(granted metaContexts, id uint32) bool {
	_, known := granted[id]
	switch {
	case !known:
		s.fail(fmt.Errorf("%v: server sent the status of a context that was not granted (id %d)", wire.CmdBlockStatus, id))
		return false
	case s.seen[id]:
		s.fail(fmt.Errorf("%v: server sent the status of a context twice (id %d)", wire.CmdBlockStatus, id))
		return false
	case s.seen == nil:
		s.seen = make(map[uint32]bool)
	}
	s.seen[id] = true
	return id == s.want
}

// fail makes the request fail; the first error is the one that the caller gets.
func (s *statusCollector) fail(err error) {
	if s.problem == nil {
		s.problem = err
	}
}

// result returns the error of a request for which the server has reported success, or nil.
func (s *statusCollector) result() error {
	if s.problem == nil && !s.seen[s.want] {
		s.fail(fmt.Errorf("%v: server left out the status of the context (id %d)", wire.CmdBlockStatus, s.want))
	}
	return s.problem
}
