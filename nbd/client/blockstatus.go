package client

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"

	"xapi-nbd/nbd/wire"
)

// maxStatusExtents is how many extents a server may send for one context, section
// "NBD_REPLY_TYPE_BLOCK_STATUS".
const maxStatusExtents = 1 << 20

// BlockStatus asks for the status of n bytes from off on in a metadata context
// that was granted, with one request. The extents follow on from each other from
// off on; there is at least one, and they cover n bytes or less: a server may
// answer for the beginning only. n above 0; what 32 bits cannot say is
// asked for in part. Status bits that the context does not define are passed on.
//
// A server with a minimum block size is asked for whole blocks. If its answer ends
// inside the first of them and before off, against the protocol, then what is left
// of that block counts as data in base:allocation, which is never wrong; in other
// contexts it is an error.
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
	return nil, fmt.Errorf("%v: server said nothing of the range", wire.CmdBlockStatus)
}

// cutExtents leaves out what is before the range, and behind it. Nil means that
// nothing is left.
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

// statusCollector gathers the status chunks of one answer.
type statusCollector struct {
	want    uint32 // the context of interest
	seen    map[uint32]bool
	extents []wire.Extent
	problem error
}

// receiveStatus reads a status chunk. What belongs to other contexts, or is
// not wanted any more, is dropped without looking.
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
	if !call.status.takes(c.contexts, binary.BigEndian.Uint32(b)) {
		return c.skip(chunk.Length)
	}
	// Grows with what comes, not with what was announced.
	var payload bytes.Buffer
	if _, err := io.CopyN(&payload, c.in, int64(chunk.Length)); err != nil {
		return lost(true, err)
	}
	_, call.status.extents, err = wire.ParseBlockStatus(chunk.Type, payload.Bytes())
	return err
}

// takes notes that a chunk has come for a context, and says whether its extents
// are of interest. A chunk too many, or for a context that was not granted, fails
// the request: who knows what the others are about.
func (s *statusCollector) takes(granted metaContexts, id uint32) bool {
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

func (s *statusCollector) fail(err error) {
	if s.problem == nil {
		s.problem = err
	}
}

// result is what a successful answer has come to.
func (s *statusCollector) result() error {
	if s.problem == nil && !s.seen[s.want] {
		s.fail(fmt.Errorf("%v: server left out the status of the context (id %d)", wire.CmdBlockStatus, s.want))
	}
	return s.problem
}
