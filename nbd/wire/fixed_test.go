package wire_test

import (
	"errors"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

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

func TestFixedGolden(t *testing.T) {
	for _, m := range fixedMessages {
		t.Run(m.name, func(t *testing.T) {
			want := unhex(t, m.bytes)
			diffBytes(t, "append", m.append(nil), want)
			diffBytes(t, "append behind something", m.append([]byte("x")), append([]byte("x"), want...))
			got, err := m.parse(want)
			if err != nil {
				t.Fatalf("parse: got error %v, want none", err)
			}
			if diff := cmp.Diff(m.want, got); diff != "" {
				t.Errorf("parse (-want +got):\n%s", diff)
			}
		})
	}
}

// TestFixedMagic flips every bit of every magic number.
func TestFixedMagic(t *testing.T) {
	for _, m := range fixedMessages {
		t.Run(m.name, func(t *testing.T) {
			for i := 0; i < len(m.magic); i += 2 {
				for bit := range 8 * m.magic[i+1] {
					b := unhex(t, m.bytes)
					b[m.magic[i]+bit/8] ^= 1 << (bit % 8)
					got, err := m.parse(b)
					var magic *wire.MagicError
					if !errors.As(err, &magic) {
						t.Fatalf("%x: got %v and error %v, want a MagicError", b, got, err)
					}
					if magic.Got == magic.Want || magic.Where == "" || magic.Error() == "" {
						t.Errorf("%x: got %+v, which does not say what is wrong", b, magic)
					}
				}
			}
		})
	}
}

func TestMagicErrorText(t *testing.T) {
	err := &wire.MagicError{Where: "request", Got: 0x12, Want: uint64(wire.MagicRequest)}
	if got, want := err.Error(), "bad magic in request: got 0x12, want 0x25609513"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestOldstyleGreeting: an oldstyle server's second magic number is not ours.
func TestOldstyleGreeting(t *testing.T) {
	b := unhex(t, ascii("NBDMAGIC")+"00420281861253 00"+"0000")
	_, err := wire.ParseGreeting((*[18]byte)(b[:18]))
	var magic *wire.MagicError
	if !errors.As(err, &magic) {
		t.Errorf("got error %v, want a MagicError", err)
	}
}

func TestExportNameReplyZeroes(t *testing.T) {
	got := wire.AppendExportNameReply(nil, 512, wire.FlagHasFlags, true)
	if len(got) != 134 {
		t.Fatalf("got %d bytes, want 8 + 2 + 124 = 134", len(got))
	}
	diffBytes(t, "answer", got, append(unhex(t, "0000000000000200 0001"), make([]byte, 124)...))
	if wire.ExportNameReplyLen+wire.ExportNameZeroes != 134 {
		t.Errorf("the constants add up to %d, want 134", wire.ExportNameReplyLen+wire.ExportNameZeroes)
	}
}

func TestIsError(t *testing.T) {
	for typ, want := range map[wire.OptionReply]bool{
		wire.RepAck: false, wire.RepServer: false, wire.RepInfo: false, wire.RepMetaContext: false,
		wire.RepErrUnsup: true, wire.RepErrTooBig: true, 1<<31 | 12345: true, 12345: false, 1 << 31: true,
	} {
		if got := typ.IsError(); got != want {
			t.Errorf("%v: got %v, want %v", typ, got, want)
		}
	}
}
