package wire

import (
	"encoding/binary"
	"fmt"
)

// OptionReply is the type of an option reply, section "Option reply types".
type OptionReply uint32

// repErr marks an error reply; it ends the option like an ACK does.
const repErr OptionReply = 1 << 31

// The option reply types.
const (
	RepAck         OptionReply = 1
	RepServer      OptionReply = 2
	RepInfo        OptionReply = 3
	RepMetaContext OptionReply = 4

	RepErrUnsup         = repErr | 1
	RepErrPolicy        = repErr | 2
	RepErrInvalid       = repErr | 3
	RepErrPlatform      = repErr | 4
	RepErrTLSReqd       = repErr | 5
	RepErrUnknown       = repErr | 6
	RepErrShutdown      = repErr | 7
	RepErrBlockSizeReqd = repErr | 8
	RepErrTooBig        = repErr | 9
	RepErrExtHeaderReqd = repErr | 10
)

// IsError reports whether the reply refuses the option. For unknown numbers the bit that
// marks errors decides.
func (r OptionReply) IsError() bool { return r&repErr != 0 }

// OptionReplyHeaderLen is the length in bytes of the header before a reply's data.
const OptionReplyHeaderLen = 20

// OptionReplyHeader precedes the data of an option reply.
type OptionReplyHeader struct {
	Option Option
	Type   OptionReply
	Length uint32 // of the data, in bytes
}

// ParseOptionReplyHeader reads the header of an option reply. It does not check the length.
// It fails with a [*MagicError].
func ParseOptionReplyHeader(b *[OptionReplyHeaderLen]byte) (OptionReplyHeader, error) {
	if got := binary.BigEndian.Uint64(b[:]); got != MagicOptionReply {
		return OptionReplyHeader{}, &MagicError{Where: "option reply", Got: got, Want: MagicOptionReply}
	}
	return OptionReplyHeader{
		Option: Option(binary.BigEndian.Uint32(b[8:])),
		Type:   OptionReply(binary.BigEndian.Uint32(b[12:])),
		Length: binary.BigEndian.Uint32(b[16:]),
	}, nil
}

// AppendOptionReply appends a reply with its data. For error replies the data
// is a text for people, which must not be longer than [MaxString].
func AppendOptionReply(b []byte, opt Option, typ OptionReply, data []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, MagicOptionReply)
	b = binary.BigEndian.AppendUint32(b, uint32(opt))
	b = binary.BigEndian.AppendUint32(b, uint32(typ))
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// ServerReply is the data of a RepServer reply to LIST.
type ServerReply struct {
	Name    string
	Details string // for people; may be empty
}

// ParseServerReply reads the data of one reply to LIST, section
// "NBD_REP_SERVER".
func ParseServerReply(data []byte) (ServerReply, error) {
	c := cursor{b: data}
	name := c.string(MaxString)
	details := string(c.rest())
	if c.err != nil {
		return ServerReply{}, fmt.Errorf("export in a list: %w", c.err)
	}
	return ServerReply{Name: name, Details: details}, nil
}

// Append appends the data of a RepServer reply.
func (r ServerReply) Append(b []byte) []byte {
	b = appendString(b, r.Name)
	return append(b, r.Details...)
}
