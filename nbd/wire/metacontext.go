package wire

import (
	"encoding/binary"
	"fmt"
)

// BaseAllocation is the one metadata context that the protocol itself defines,
// section "Metadata querying".
const BaseAllocation = "base:allocation"

// The states of BaseAllocation.
const (
	StateHole uint64 = 1 << 0 // no storage is allocated
	StateZero uint64 = 1 << 1 // reads as zeroes
)

// MetaContextRequest is the data of LIST_META_CONTEXT and SET_META_CONTEXT.
type MetaContextRequest struct {
	Export  string
	Queries []string
}

// ParseMetaContextRequest reads the data of LIST_META_CONTEXT or
// SET_META_CONTEXT. It fails if a string is longer than [MaxString] or the lengths inside do
// not match the length of the data.
func ParseMetaContextRequest(data []byte) (MetaContextRequest, error) {
	c := cursor{b: data}
	r := MetaContextRequest{Export: c.string(MaxString)}
	n := c.uint32()
	if c.err == nil && uint64(n)*4 > uint64(len(c.b)) {
		c.fail("%d queries announced, %d bytes left for them", n, len(c.b))
	}
	for i := uint32(0); i < n && c.err == nil; i++ {
		r.Queries = append(r.Queries, c.string(MaxString))
	}
	c.end()
	if c.err != nil {
		return MetaContextRequest{}, c.err
	}
	return r, nil
}

// Append appends the data of LIST_META_CONTEXT or SET_META_CONTEXT.
func (r MetaContextRequest) Append(b []byte) []byte {
	b = appendString(b, r.Export)
	b = binary.BigEndian.AppendUint32(b, uint32(len(r.Queries)))
	for _, q := range r.Queries {
		b = appendString(b, q)
	}
	return b
}

// MetaContext is the data of a RepMetaContext reply.
type MetaContext struct {
	ID   uint32 // its number in chunks; 0 in a list
	Name string
}

// ParseMetaContext reads the data of a RepMetaContext reply.
func ParseMetaContext(data []byte) (MetaContext, error) {
	c := cursor{b: data}
	m := MetaContext{ID: c.uint32()}
	if c.err == nil && len(c.b) > MaxString {
		c.fail("name of %d bytes, at most %d allowed", len(c.b), MaxString)
	}
	m.Name = string(c.rest())
	if c.err != nil {
		return MetaContext{}, fmt.Errorf("%v: %w", RepMetaContext, c.err)
	}
	return m, nil
}

// Append appends the data of a RepMetaContext reply.
func (m MetaContext) Append(b []byte) []byte {
	return append(binary.BigEndian.AppendUint32(b, m.ID), m.Name...)
}

// Extent is a range of bytes with the same status in one metadata context.
type Extent struct {
	Length uint64 // bytes, not 0
	Status uint64 // of the context; 32 bits without extended headers
}

// Lengths in bytes of the parts of a status chunk's payload.
const (
	ExtentLen         = 8  // of a BLOCK_STATUS chunk
	ExtendedExtentLen = 16 // of a BLOCK_STATUS_EXT chunk
)

// AppendBlockStatus appends the payload of a BLOCK_STATUS chunk. Lengths and
// statuses must fit 32 bits.
func AppendBlockStatus(b []byte, id uint32, extents []Extent) []byte {
	b = binary.BigEndian.AppendUint32(b, id)
	for _, e := range extents {
		b = binary.BigEndian.AppendUint32(b, uint32(e.Length))
		b = binary.BigEndian.AppendUint32(b, uint32(e.Status))
	}
	return b
}

// AppendBlockStatusExt appends the payload of a BLOCK_STATUS_EXT chunk.
func AppendBlockStatusExt(b []byte, id uint32, extents []Extent) []byte {
	b = binary.BigEndian.AppendUint32(b, id)
	b = binary.BigEndian.AppendUint32(b, uint32(len(extents)))
	for _, e := range extents {
		b = binary.BigEndian.AppendUint64(b, e.Length)
		b = binary.BigEndian.AppendUint64(b, e.Status)
	}
	return b
}

// ParseBlockStatus reads the payload of a BLOCK_STATUS or BLOCK_STATUS_EXT
// chunk. No extents, or one of length 0, is an error.
func ParseBlockStatus(t ChunkType, payload []byte) (id uint32, extents []Extent, err error) {
	c := cursor{b: payload}
	id = c.uint32()
	size := ExtentLen
	if t == ChunkBlockStatusExt {
		size = ExtendedExtentLen
		if n := c.uint32(); c.err == nil && uint64(n)*ExtendedExtentLen != uint64(len(c.b)) {
			c.fail("%d extents announced, %d bytes of them there", n, len(c.b))
		}
	}
	if c.err == nil && (len(c.b) == 0 || len(c.b)%size != 0) {
		c.fail("%d bytes are no whole extents", len(c.b))
	}
	for len(c.b) > 0 && c.err == nil {
		var e Extent
		if size == ExtendedExtentLen {
			e = Extent{Length: c.uint64(), Status: c.uint64()}
		} else {
			e = Extent{Length: uint64(c.uint32()), Status: uint64(c.uint32())}
		}
		if e.Length == 0 {
			c.fail("an extent of 0 bytes")
		}
		extents = append(extents, e)
	}
	if c.err != nil {
		return 0, nil, fmt.Errorf("%v: %w", t, c.err)
	}
	return id, extents, nil
}

// StatusFilter is the payload of a BLOCK_STATUS request with extended headers that asks for
// only some of the negotiated contexts.
type StatusFilter struct {
	Length uint64 // of the range in bytes
	IDs    []uint32
}

// ParseStatusFilter reads the payload of a BLOCK_STATUS request.
func ParseStatusFilter(payload []byte) (StatusFilter, error) {
	c := cursor{b: payload}
	f := StatusFilter{Length: c.uint64()}
	if c.err == nil && len(c.b)%4 != 0 {
		c.fail("%d bytes are no whole ids", len(c.b))
	}
	for len(c.b) > 0 && c.err == nil {
		f.IDs = append(f.IDs, c.uint32())
	}
	if c.err != nil {
		return StatusFilter{}, c.err
	}
	return f, nil
}

// Append appends the payload of a BLOCK_STATUS request.
func (f StatusFilter) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, f.Length)
	for _, id := range f.IDs {
		b = binary.BigEndian.AppendUint32(b, id)
	}
	return b
}

func appendString(b []byte, s string) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
	return append(b, s...)
}
