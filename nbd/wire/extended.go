package wire

import "encoding/binary"

// ExtendedRequestLen is the length of a request with extended headers in bytes.
const ExtendedRequestLen = 32

// ParseExtendedRequest reads a request with extended headers. It checks only the magic
// number, and fails with a [*MagicError].
func ParseExtendedRequest(b *[ExtendedRequestLen]byte) (Request, error) {
	if got := binary.BigEndian.Uint32(b[:]); got != MagicExtendedRequest {
		return Request{}, &MagicError{Where: "extended request", Got: uint64(got), Want: uint64(MagicExtendedRequest)}
	}
	return Request{
		Flags:   CommandFlags(binary.BigEndian.Uint16(b[4:])),
		Command: Command(binary.BigEndian.Uint16(b[6:])),
		Cookie:  binary.BigEndian.Uint64(b[8:]),
		Offset:  binary.BigEndian.Uint64(b[16:]),
		Length:  binary.BigEndian.Uint64(b[24:]),
	}, nil
}

// AppendExtended appends the request with extended headers.
func (r Request) AppendExtended(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, MagicExtendedRequest)
	b = binary.BigEndian.AppendUint16(b, uint16(r.Flags))
	b = binary.BigEndian.AppendUint16(b, uint16(r.Command))
	b = binary.BigEndian.AppendUint64(b, r.Cookie)
	b = binary.BigEndian.AppendUint64(b, r.Offset)
	return binary.BigEndian.AppendUint64(b, r.Length)
}

// ExtendedChunkLen is the length of an extended reply chunk's header in bytes.
const ExtendedChunkLen = 32

// PutExtendedChunk writes an extended reply chunk's header into b.
func PutExtendedChunk(b *[ExtendedChunkLen]byte, c Chunk) {
	binary.BigEndian.PutUint32(b[:], MagicExtendedReply)
	binary.BigEndian.PutUint16(b[4:], uint16(c.Flags))
	binary.BigEndian.PutUint16(b[6:], uint16(c.Type))
	binary.BigEndian.PutUint64(b[8:], c.Cookie)
	binary.BigEndian.PutUint64(b[16:], c.Offset)
	binary.BigEndian.PutUint64(b[24:], c.Length)
}

// ParseExtendedChunk reads an extended reply chunk's header. It does not check the length.
// It fails with a [*MagicError].
func ParseExtendedChunk(b *[ExtendedChunkLen]byte) (Chunk, error) {
	if got := binary.BigEndian.Uint32(b[:]); got != MagicExtendedReply {
		return Chunk{}, &MagicError{Where: "extended reply chunk", Got: uint64(got), Want: uint64(MagicExtendedReply)}
	}
	return Chunk{
		Flags:  ChunkFlags(binary.BigEndian.Uint16(b[4:])),
		Type:   ChunkType(binary.BigEndian.Uint16(b[6:])),
		Cookie: binary.BigEndian.Uint64(b[8:]),
		Offset: binary.BigEndian.Uint64(b[16:]),
		Length: binary.BigEndian.Uint64(b[24:]),
	}, nil
}
