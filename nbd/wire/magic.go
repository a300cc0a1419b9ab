package wire

import (
	"encoding/binary"
	"fmt"
)

// The magic numbers, section "Protocol phases".
const (
	// MagicNBD opens the greeting: the bytes "NBDMAGIC".
	MagicNBD uint64 = 0x4e42444d41474943
	// MagicOption follows it and opens every option: the bytes "IHAVEOPT".
	MagicOption uint64 = 0x49484156454f5054
	// MagicOptionReply opens every option reply.
	MagicOptionReply uint64 = 0x0003e889045565a9
	// MagicRequest opens every compact request of the transmission phase.
	MagicRequest uint32 = 0x25609513
	// MagicSimpleReply opens every simple reply.
	MagicSimpleReply uint32 = 0x67446698
	// MagicStructuredReply opens every structured reply chunk.
	MagicStructuredReply uint32 = 0x668e33ef
	// MagicExtendedRequest opens every request with extended headers.
	MagicExtendedRequest uint32 = 0x21e41c71
	// MagicExtendedReply opens every reply chunk with extended headers.
	MagicExtendedReply uint32 = 0x6e8a278c
)

// MagicError means that a peer did not send the magic number that a message begins with.
// The connection cannot be used any more, because the next message cannot be found.
type MagicError struct {
	Where     string // which message
	Got, Want uint64
}

func (e *MagicError) Error() string {
	return fmt.Sprintf("bad magic in %s: got %#x, want %#x", e.Where, e.Got, e.Want)
}

// GreetingLen is the length of the server's first message in bytes.
const GreetingLen = 18

// AppendGreeting appends the server's first message of newstyle negotiation,
// section "Newstyle negotiation".
func AppendGreeting(b []byte, f HandshakeFlags) []byte {
	b = binary.BigEndian.AppendUint64(b, MagicNBD)
	b = binary.BigEndian.AppendUint64(b, MagicOption)
	return binary.BigEndian.AppendUint16(b, uint16(f))
}

// ParseGreeting reads the server's first message. It fails on anything that
// is not newstyle, with a [*MagicError].
func ParseGreeting(b *[GreetingLen]byte) (HandshakeFlags, error) {
	if got := binary.BigEndian.Uint64(b[:]); got != MagicNBD {
		return 0, &MagicError{Where: "greeting", Got: got, Want: MagicNBD}
	}
	if got := binary.BigEndian.Uint64(b[8:]); got != MagicOption {
		return 0, &MagicError{Where: "greeting (newstyle)", Got: got, Want: MagicOption}
	}
	return HandshakeFlags(binary.BigEndian.Uint16(b[16:])), nil
}

// AppendClientFlags appends the client's answer to the greeting.
func AppendClientFlags(b []byte, f ClientFlags) []byte {
	return binary.BigEndian.AppendUint32(b, uint32(f))
}

// ParseClientFlags reads the client's answer to the greeting.
func ParseClientFlags(b *[4]byte) ClientFlags {
	return ClientFlags(binary.BigEndian.Uint32(b[:]))
}
