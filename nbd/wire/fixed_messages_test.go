package wire_test

import (
	"slices"

	"xapi-nbd/nbd/wire"
)

// fixedMessage is one message of fixed layout, in the protocol's bytes and in
// Go's. Prefixes and extra bytes cannot reach its parser: it takes an array.
type fixedMessage struct {
	name   string
	bytes  string
	append func(prefix []byte) []byte
	parse  func(b []byte) (any, error)
	want   any
	magic  []int // offset and length of each magic number
}

var fixedMessages = slices.Concat(basicMessages, chunkMessages, extendedMessages)

// basicMessages are those that need no negotiation.
var basicMessages = []fixedMessage{{
	name: "greeting", bytes: ascii("NBDMAGIC") + ascii("IHAVEOPT") + "0003",
	append: func(b []byte) []byte {
		return wire.AppendGreeting(b, wire.FlagFixedNewstyle|wire.FlagNoZeroes)
	},
	parse: func(b []byte) (any, error) { return wire.ParseGreeting((*[18]byte)(b)) },
	want:  wire.HandshakeFlags(3),
	magic: []int{0, 8, 8, 8},
}, {
	name: "greeting with flags of the future", bytes: ascii("NBDMAGIC") + ascii("IHAVEOPT") + "8001",
	append: func(b []byte) []byte { return wire.AppendGreeting(b, wire.FlagFixedNewstyle|1<<15) },
	parse:  func(b []byte) (any, error) { return wire.ParseGreeting((*[18]byte)(b)) },
	want:   wire.HandshakeFlags(0x8001),
}, {
	name: "client flags", bytes: "00000003",
	append: func(b []byte) []byte {
		return wire.AppendClientFlags(b, wire.FlagCFixedNewstyle|wire.FlagCNoZeroes)
	},
	parse: func(b []byte) (any, error) { return wire.ParseClientFlags((*[4]byte)(b)), nil },
	want:  wire.ClientFlags(3),
}, {
	name: "client flags, unknown bit", bytes: "80000001",
	append: func(b []byte) []byte { return wire.AppendClientFlags(b, 1<<31|1) },
	parse:  func(b []byte) (any, error) { return wire.ParseClientFlags((*[4]byte)(b)), nil },
	want:   wire.ClientFlags(1<<31 | 1),
}, {
	name: "option header of LIST", bytes: ascii("IHAVEOPT") + "00000003 00000000",
	append: func(b []byte) []byte { return wire.AppendOption(b, wire.OptList, nil) },
	parse:  func(b []byte) (any, error) { return wire.ParseOptionHeader((*[16]byte)(b)) },
	want:   wire.OptionHeader{Option: wire.OptList},
	magic:  []int{0, 8},
}, {
	name: "option reply header of an ACK", bytes: "0003e889045565a9 00000007 00000001 00000000",
	append: func(b []byte) []byte { return wire.AppendOptionReply(b, wire.OptGo, wire.RepAck, nil) },
	parse:  func(b []byte) (any, error) { return wire.ParseOptionReplyHeader((*[20]byte)(b)) },
	want:   wire.OptionReplyHeader{Option: wire.OptGo, Type: wire.RepAck},
	magic:  []int{0, 8},
}, {
	name: "answer to EXPORT_NAME", bytes: "0000000102030400 0103",
	append: func(b []byte) []byte {
		return wire.AppendExportNameReply(b, 0x102030400, wire.FlagHasFlags|wire.FlagReadOnly|wire.FlagCanMultiConn, false)
	},
	parse: func(b []byte) (any, error) {
		size, flags := wire.ParseExportNameReply((*[10]byte)(b))
		return wire.ExportInfo{Size: size, Flags: flags}, nil
	},
	want: wire.ExportInfo{Size: 0x102030400, Flags: 0x103},
}, {
	name: "request", bytes: "25609513 0001 0001 1122334455667788 0000010000000200 00001000",
	append: func(b []byte) []byte {
		return wire.Request{Flags: wire.CmdFlagFUA, Command: wire.CmdWrite, Cookie: 0x1122334455667788,
			Offset: 0x10000000200, Length: 4096}.Append(b)
	},
	parse: func(b []byte) (any, error) { return wire.ParseRequest((*[28]byte)(b)) },
	want: wire.Request{Flags: wire.CmdFlagFUA, Command: wire.CmdWrite, Cookie: 0x1122334455667788,
		Offset: 0x10000000200, Length: 4096},
	magic: []int{0, 4},
}, {
	name: "request, every bit set", bytes: "25609513 ffff ffff ffffffffffffffff ffffffffffffffff ffffffff",
	append: func(b []byte) []byte {
		return wire.Request{Flags: 0xffff, Command: 0xffff, Cookie: 1<<64 - 1, Offset: 1<<64 - 1, Length: 1<<32 - 1}.Append(b)
	},
	parse: func(b []byte) (any, error) { return wire.ParseRequest((*[28]byte)(b)) },
	want:  wire.Request{Flags: 0xffff, Command: 0xffff, Cookie: 1<<64 - 1, Offset: 1<<64 - 1, Length: 1<<32 - 1},
}, {
	name: "simple reply, success", bytes: "67446698 00000000 0102030405060708",
	append: func(b []byte) []byte { return appendSimpleReply(b, wire.Success, 0x0102030405060708) },
	parse:  func(b []byte) (any, error) { return wire.ParseSimpleReply((*[16]byte)(b)) },
	want:   wire.SimpleReply{Cookie: 0x0102030405060708},
	magic:  []int{0, 4},
}, {
	name: "simple reply, error", bytes: "67446698 0000006c ffffffffffffffff",
	append: func(b []byte) []byte { return appendSimpleReply(b, wire.ESHUTDOWN, 1<<64-1) },
	parse:  func(b []byte) (any, error) { return wire.ParseSimpleReply((*[16]byte)(b)) },
	want:   wire.SimpleReply{Errno: wire.ESHUTDOWN, Cookie: 1<<64 - 1},
}}

func appendSimpleReply(b []byte, errno wire.Errno, cookie uint64) []byte {
	// Not zeroed: Put must write every byte of a buffer that was used before.
	m := [16]byte{}
	for i := range m {
		m[i] = 0xee
	}
	wire.PutSimpleReply(&m, errno, cookie)
	return append(b, m[:]...)
}
