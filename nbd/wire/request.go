package wire

import "encoding/binary"

// Command is the type of a request, section "Request types".
type Command uint16

// The commands.
const (
	CmdRead        Command = 0
	CmdWrite       Command = 1
	CmdDisc        Command = 2
	CmdFlush       Command = 3
	CmdTrim        Command = 4
	CmdCache       Command = 5
	CmdWriteZeroes Command = 6
	CmdBlockStatus Command = 7
	CmdResize      Command = 8
)

// RequestLen is the length of a compact request in bytes.
const RequestLen = 28

// Request is one request, section "Request message". The payload of a
// WRITE follows it on the wire and is not part of it.
type Request struct {
	Flags   CommandFlags
	Command Command
	Cookie  uint64 // chosen by the client, copied into the reply
	Offset  uint64 // bytes
	Length  uint64 // bytes; 32 bits without extended headers
}

// ParseRequest reads a compact request. It checks only the magic number, and fails with a
// [*MagicError].
func ParseRequest(b *[RequestLen]byte) (Request, error) {
	if got := binary.BigEndian.Uint32(b[:]); got != MagicRequest {
		return Request{}, &MagicError{Where: "request", Got: uint64(got), Want: uint64(MagicRequest)}
	}
	return Request{
		Flags:   CommandFlags(binary.BigEndian.Uint16(b[4:])),
		Command: Command(binary.BigEndian.Uint16(b[6:])),
		Cookie:  binary.BigEndian.Uint64(b[8:]),
		Offset:  binary.BigEndian.Uint64(b[16:]),
		Length:  uint64(binary.BigEndian.Uint32(b[24:])),
	}, nil
}

// Append appends the request as a compact one.
func (r Request) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, MagicRequest)
	b = binary.BigEndian.AppendUint16(b, uint16(r.Flags))
	b = binary.BigEndian.AppendUint16(b, uint16(r.Command))
	b = binary.BigEndian.AppendUint64(b, r.Cookie)
	b = binary.BigEndian.AppendUint64(b, r.Offset)
	return binary.BigEndian.AppendUint32(b, uint32(r.Length))
}
