package wire

import (
	"encoding/binary"
	"fmt"
)

// ChunkType is the type of a structured reply chunk, section "Structured reply
// types".
type ChunkType uint16

// chunkErr marks a chunk that reports an error.
const chunkErr ChunkType = 1 << 15

// The chunk types.
const (
	ChunkNone           ChunkType = 0
	ChunkOffsetData     ChunkType = 1
	ChunkOffsetHole     ChunkType = 2
	ChunkBlockStatus    ChunkType = 5
	ChunkBlockStatusExt ChunkType = 6 // extended headers only

	ChunkError       = chunkErr | 1
	ChunkErrorOffset = chunkErr | 2
)

// IsError reports whether the chunk means that the request failed. For unknown numbers the
// bit that marks errors decides.
func (t ChunkType) IsError() bool { return t&chunkErr != 0 }

// ChunkFlags modify one chunk, section "Structured reply flags".
type ChunkFlags uint16

// ChunkFlagDone marks the last chunk of a reply.
const ChunkFlagDone ChunkFlags = 1 << 0

// ChunkLen is the length of a structured reply chunk's header in bytes.
const ChunkLen = 20

// Chunk is the header of a structured reply chunk, section "Structured reply
// chunk message"; with extended headers it also carries the request's offset.
type Chunk struct {
	Flags  ChunkFlags
	Type   ChunkType
	Cookie uint64
	Offset uint64 // of the request; extended headers only
	Length uint64 // of the payload in bytes; 32 bits without extended headers
}

// PutChunk writes a structured reply chunk's header into b.
func PutChunk(b *[ChunkLen]byte, c Chunk) {
	binary.BigEndian.PutUint32(b[:], MagicStructuredReply)
	binary.BigEndian.PutUint16(b[4:], uint16(c.Flags))
	binary.BigEndian.PutUint16(b[6:], uint16(c.Type))
	binary.BigEndian.PutUint64(b[8:], c.Cookie)
	binary.BigEndian.PutUint32(b[16:], uint32(c.Length))
}

// ParseChunk reads a structured reply chunk's header. It does not check the length. It fails
// with a [*MagicError].
func ParseChunk(b *[ChunkLen]byte) (Chunk, error) {
	if got := binary.BigEndian.Uint32(b[:]); got != MagicStructuredReply {
		return Chunk{}, &MagicError{Where: "structured reply chunk", Got: uint64(got), Want: uint64(MagicStructuredReply)}
	}
	return Chunk{
		Flags:  ChunkFlags(binary.BigEndian.Uint16(b[4:])),
		Type:   ChunkType(binary.BigEndian.Uint16(b[6:])),
		Cookie: binary.BigEndian.Uint64(b[8:]),
		Length: uint64(binary.BigEndian.Uint32(b[16:])),
	}, nil
}

// Lengths in bytes of the fixed parts of chunks.
const (
	ChunkOffsetLen = 8  // before the data of an OFFSET_DATA chunk
	ChunkHoleLen   = 12 // an OFFSET_HOLE chunk's payload
)

// AppendHole appends the payload of an OFFSET_HOLE chunk: the offset of the zeroes in the
// export and their number.
func AppendHole(b []byte, offset uint64, length uint32) []byte {
	b = binary.BigEndian.AppendUint64(b, offset)
	return binary.BigEndian.AppendUint32(b, length)
}

// ParseHole reads the payload of an OFFSET_HOLE chunk.
func ParseHole(payload []byte) (offset uint64, length uint32, err error) {
	c := cursor{b: payload}
	offset, length = c.uint64(), c.uint32()
	c.end()
	if c.err == nil && length == 0 {
		c.fail("a hole of 0 bytes")
	}
	if c.err != nil {
		return 0, 0, fmt.Errorf("%v: %w", ChunkOffsetHole, c.err)
	}
	return offset, length, nil
}

// ChunkFailure is the payload of an error chunk.
type ChunkFailure struct {
	Errno  Errno
	Text   string // for people, untrusted; at most 4096 bytes
	Offset uint64 // ERROR_OFFSET only
}

// Append appends the payload of an ERROR chunk, or of an ERROR_OFFSET chunk.
func (f ChunkFailure) Append(b []byte, t ChunkType) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(f.Errno))
	b = binary.BigEndian.AppendUint16(b, uint16(len(f.Text)))
	b = append(b, f.Text...)
	if t == ChunkErrorOffset {
		b = binary.BigEndian.AppendUint64(b, f.Offset)
	}
	return b
}

// ParseChunkFailure reads the payload of an error chunk of type t. For unknown types it
// ignores the bytes after the text.
func ParseChunkFailure(t ChunkType, payload []byte) (ChunkFailure, error) {
	c := cursor{b: payload}
	f := ChunkFailure{Errno: Errno(c.uint32())}
	n := int(c.uint16())
	if n > MaxString {
		c.fail("text of %d bytes, at most %d allowed", n, MaxString)
	}
	f.Text = string(c.take(n))
	switch t {
	case ChunkError:
		c.end()
	case ChunkErrorOffset:
		f.Offset = c.uint64()
		c.end()
	default:
	}
	if c.err == nil && f.Errno == Success {
		c.fail("an error with the number of success")
	}
	if c.err != nil {
		return ChunkFailure{}, fmt.Errorf("%v: %w", t, c.err)
	}
	return f, nil
}
