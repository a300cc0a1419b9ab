package wire

import "encoding/binary"

// SimpleReplyLen is the length of a simple reply's header in bytes.
const SimpleReplyLen = 16

// SimpleReply is the header of a simple reply, section "Simple reply message".
// The data of a successful READ follows it on the wire.
type SimpleReply struct {
	Errno  Errno // 0 is success
	Cookie uint64
}

// PutSimpleReply writes a simple reply's header into b. If b is in front of the payload,
// both can be sent with one write.
func PutSimpleReply(b *[SimpleReplyLen]byte, errno Errno, cookie uint64) {
	binary.BigEndian.PutUint32(b[:], MagicSimpleReply)
	binary.BigEndian.PutUint32(b[4:], uint32(errno))
	binary.BigEndian.PutUint64(b[8:], cookie)
}

// ParseSimpleReply reads a simple reply's header. It fails with a
// [*MagicError].
func ParseSimpleReply(b *[SimpleReplyLen]byte) (SimpleReply, error) {
	if got := binary.BigEndian.Uint32(b[:]); got != MagicSimpleReply {
		return SimpleReply{}, &MagicError{Where: "simple reply", Got: uint64(got), Want: uint64(MagicSimpleReply)}
	}
	return SimpleReply{
		Errno:  Errno(binary.BigEndian.Uint32(b[4:])),
		Cookie: binary.BigEndian.Uint64(b[8:]),
	}, nil
}
