package nbd

import (
	"fmt"
	"math"
	"slices"

	"xapi-nbd/nbd/wire"
)

var cmdBlockStatus = &command{
	flags:   wire.CmdFlagReqOne | wire.CmdFlagPayloadLen,
	ranged:  true,
	past:    wire.EINVAL,
	offered: func(s *session) bool { return len(s.contexts) > 0 },
	answer:  (*transmission).blockStatus,
}

const (
	// maxExtents bounds the extents of one reply, in all contexts together. The
	// client asks again for the rest.
	maxExtents = 4096
	// extentsMemory is the memory for one reply, in bytes: the extents of the device, the
	// extents of the reply while they are collected, and the reply.
	extentsMemory = maxExtents * 64
	// maxFilter limits the payload of a request that selects contexts, in bytes.
	maxFilter = 4096
)

// blockStatus serves one BLOCK_STATUS, section "NBD_CMD_BLOCK_STATUS". The reply has one
// chunk for each context that is asked for.
func (t *transmission) blockStatus(req wire.Request, payload []byte) {
	contexts, errno := t.sess.contexts, wire.Success
	if req.Flags&wire.CmdFlagPayloadLen != 0 {
		req, contexts, errno = t.sess.filter(req, payload)
	}
	if errno == wire.Success && req.Length == 0 {
		errno = wire.EINVAL // a reply has at least one extent, and no empty one
	}
	if errno != wire.Success {
		t.refuse(req, errno)
		return
	}
	var b []byte
	for i, c := range contexts {
		extents, err := t.sess.extents(c, req, maxExtents/len(contexts))
		if err != nil {
			t.failed(req, err)
			return
		}
		flags := wire.ChunkFlags(0)
		if i == len(contexts)-1 {
			flags = wire.ChunkFlagDone
		}
		b = t.out.appendStatus(b, req, flags, c.ID, extents)
	}
	t.out.send(b)
}

// filter applies the payload of a request with extended headers, which has the range and
// selects some of the negotiated contexts.
func (s *session) filter(req wire.Request, payload []byte) (wire.Request, []wire.MetaContext, wire.Errno) {
	f, err := wire.ParseStatusFilter(payload)
	if err != nil || len(f.IDs) == 0 {
		return req, nil, wire.EINVAL
	}
	var contexts []wire.MetaContext
	for _, id := range f.IDs {
		i := slices.IndexFunc(s.contexts, func(c wire.MetaContext) bool { return c.ID == id })
		if i < 0 || slices.Contains(contexts, s.contexts[i]) {
			return req, nil, wire.EINVAL // not selected, or asked for twice
		}
		contexts = append(contexts, s.contexts[i])
	}
	req.Length = f.Length
	return req, contexts, s.validateRange(&command{past: wire.EINVAL}, req)
}

// extents asks the device for the extents of one context, and changes the answer to
// the form that the protocol demands: neighbours that differ, all but the last within
// the request, none after the end of the export, and with REQ_ONE a single one within the
// request. At most limit extents are returned.
func (s *session) extents(c wire.MetaContext, req wire.Request, limit int) ([]wire.Extent, error) {
	device, err := s.contextExtents(c, int64(req.Offset), int64(req.Length))
	if err != nil {
		return nil, err
	}
	var out []wire.Extent
	covered := uint64(0)
	for _, e := range device {
		e.Length = min(e.Length, s.info.Size-req.Offset-covered)
		if last := len(out) - 1; last >= 0 && out[last].Status == e.Status {
			out[last].Length += e.Length
		} else if e.Length > 0 {
			if covered >= req.Length || len(out) == limit {
				break
			}
			if e.Status > math.MaxUint32 && s.mode != extendedHeaders {
				return nil, fmt.Errorf("status %#x of %s needs extended headers", e.Status, c.Name)
			}
			out = append(out, e)
		}
		covered += e.Length
	}
	if len(out) == 0 {
		if c.ID != baseAllocationID {
			return nil, fmt.Errorf("the device has only empty extents of %s", c.Name)
		}
		out = []wire.Extent{{Length: req.Length}} // nothing is known: data
	}
	if req.Flags&wire.CmdFlagReqOne != 0 {
		out = out[:1]
		out[0].Length = min(out[0].Length, req.Length)
	}
	return s.fit(out), nil
}

// longExtent is the longest length of an extent that fits into 32 bits and is a multiple of
// every block size.
const longExtent = 1<<32 - wire.MaxMinBlock

// fit cuts off the extents where a length does not fit into 32 bits, unless headers are
// extended. The client asks again for the rest.
func (s *session) fit(extents []wire.Extent) []wire.Extent {
	if s.mode == extendedHeaders {
		return extents
	}
	for i := range extents {
		if extents[i].Length > longExtent {
			extents[i].Length = longExtent
			return extents[:i+1]
		}
	}
	return extents
}
