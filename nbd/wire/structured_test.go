package wire_test

import (
	"errors"
	"strings"
	"testing"

	"xapi-nbd/nbd/wire"
)

func parseChunk(b []byte) (any, error) { return wire.ParseChunk((*[20]byte)(b)) }

// appendChunk hands Put a buffer that was used before: it must write all of it.
func appendChunk(b []byte, c wire.Chunk) []byte {
	m := [20]byte([]byte(strings.Repeat("\xee", 20)))
	wire.PutChunk(&m, c)
	return append(b, m[:]...)
}

func chunkAppender(c wire.Chunk) func([]byte) []byte {
	return func(b []byte) []byte { return appendChunk(b, c) }
}

var (
	dataChunk   = wire.Chunk{Type: wire.ChunkOffsetData, Cookie: 0x0102030405060708, Length: 4104}
	noneChunk   = wire.Chunk{Flags: wire.ChunkFlagDone, Type: wire.ChunkNone, Cookie: 1}
	errorChunk  = wire.Chunk{Flags: wire.ChunkFlagDone, Type: wire.ChunkErrorOffset, Cookie: 2, Length: 14}
	futureChunk = wire.Chunk{Flags: 0xffff, Type: 0xffff, Cookie: 1<<64 - 1, Length: 1<<32 - 1}
)

var chunkMessages = []fixedMessage{{
	name: "chunk of data", bytes: "668e33ef 0000 0001 0102030405060708 00001008",
	append: chunkAppender(dataChunk), parse: parseChunk, want: dataChunk,
	magic: []int{0, 4},
}, {
	name: "chunk of nothing, the last", bytes: "668e33ef 0001 0000 0000000000000001 00000000",
	append: chunkAppender(noneChunk), parse: parseChunk, want: noneChunk,
	magic: []int{0, 4},
}, {
	name: "chunk of an error", bytes: "668e33ef 0001 8002 0000000000000002 0000000e",
	append: chunkAppender(errorChunk), parse: parseChunk, want: errorChunk,
}, {
	name: "chunk, every bit set", bytes: "668e33ef ffff ffff ffffffffffffffff ffffffff",
	append: chunkAppender(futureChunk), parse: parseChunk, want: futureChunk,
}}

// parsedHole is a parsed OFFSET_HOLE chunk.
type parsedHole struct {
	Offset uint64
	Length uint32
}

func parseHole(b []byte) (any, error) {
	offset, length, err := wire.ParseHole(b)
	return parsedHole{offset, length}, err
}

func parseFailure(t wire.ChunkType) func([]byte) (any, error) {
	return func(b []byte) (any, error) { return wire.ParseChunkFailure(t, b) }
}

func appendFailure(t wire.ChunkType, f wire.ChunkFailure) func([]byte) []byte {
	return func(b []byte) []byte { return f.Append(b, t) }
}

var payloadMessages = []variableMessage{{
	name: "hole", bytes: "0000010000000200 00010000",
	append: func(b []byte) []byte { return wire.AppendHole(b, 0x10000000200, 65536) },
	parse:  parseHole, want: parsedHole{0x10000000200, 65536},
}, {
	name: "largest hole", bytes: "ffffffffffffffff ffffffff",
	append: func(b []byte) []byte { return wire.AppendHole(b, 1<<64-1, 1<<32-1) },
	parse:  parseHole, want: parsedHole{1<<64 - 1, 1<<32 - 1},
}, {
	name: "error", bytes: "00000005 0008" + ascii("bad disk"),
	append: appendFailure(wire.ChunkError, wire.ChunkFailure{Errno: wire.EIO, Text: "bad disk", Offset: 7}),
	parse:  parseFailure(wire.ChunkError), want: wire.ChunkFailure{Errno: wire.EIO, Text: "bad disk"},
}, {
	name: "error without a text", bytes: "00000016 0000",
	append: appendFailure(wire.ChunkError, wire.ChunkFailure{Errno: wire.EINVAL}),
	parse:  parseFailure(wire.ChunkError), want: wire.ChunkFailure{Errno: wire.EINVAL},
}, {
	name: "error with a number of the future", bytes: "00012345 0001" + ascii("?"),
	append: appendFailure(wire.ChunkError, wire.ChunkFailure{Errno: 0x12345, Text: "?"}),
	parse:  parseFailure(wire.ChunkError), want: wire.ChunkFailure{Errno: 0x12345, Text: "?"},
}, {
	name: "error with an offset", bytes: "00000005 0003" + ascii("bad") + "0000010000000200",
	append: appendFailure(wire.ChunkErrorOffset, wire.ChunkFailure{Errno: wire.EIO, Text: "bad", Offset: 0x10000000200}),
	parse:  parseFailure(wire.ChunkErrorOffset), want: wire.ChunkFailure{Errno: wire.EIO, Text: "bad", Offset: 0x10000000200},
}, {
	name: "error with an offset and no text", bytes: "0000001c 0000 ffffffffffffffff",
	append: appendFailure(wire.ChunkErrorOffset, wire.ChunkFailure{Errno: wire.ENOSPC, Offset: 1<<64 - 1}),
	parse:  parseFailure(wire.ChunkErrorOffset), want: wire.ChunkFailure{Errno: wire.ENOSPC, Offset: 1<<64 - 1},
}}

// TestChunkPayloadsRefused parses payloads with valid lengths and invalid content.
func TestChunkPayloadsRefused(t *testing.T) {
	long := strings.Repeat("n", wire.MaxString)
	tests := []struct {
		name  string
		bytes string
		parse func([]byte) (any, error)
		ok    bool
	}{
		{"hole of nothing", "0000000000000200 00000000", parseHole, false},
		{"error that is success", "00000000 0000", parseFailure(wire.ChunkError), false},
		{"error that is success, at an offset", "00000000 0000 0000000000000000", parseFailure(wire.ChunkErrorOffset), false},
		{"unknown error that is success", "00000000 0000", parseFailure(1<<15 | 77), false},
		{"text one longer", "00000005 0005" + ascii("text"), parseFailure(wire.ChunkError), false},
		{"text one shorter", "00000005 0003" + ascii("text"), parseFailure(wire.ChunkError), false},
		{"text of 64 KiB", "00000005 ffff" + ascii("text"), parseFailure(wire.ChunkError), false},
		{"text that eats the offset", "00000005 0008 0000000000000200", parseFailure(wire.ChunkErrorOffset), false},
		{"offset of 7 bytes", "00000005 0001 0000000000000200", parseFailure(wire.ChunkErrorOffset), false},
		{"offset missing", "00000005 0000", parseFailure(wire.ChunkErrorOffset), false},
		{"offset not expected", "00000005 0000 0000000000000200", parseFailure(wire.ChunkError), false},
		{"longest text", "00000005 1000" + ascii(long), parseFailure(wire.ChunkError), true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := tt.parse(unhex(t, tt.bytes))
			if tt.ok != (err == nil) || !tt.ok && !errors.Is(err, wire.ErrMalformed) {
				t.Errorf("got %v and error %v, want ok %v or ErrMalformed", got, err, tt.ok)
			}
		})
	}
}

// TestUnknownErrorChunk: an error of an unknown type is still an error
// with a number, with any bytes behind the number.
func TestUnknownErrorChunk(t *testing.T) {
	const unknown wire.ChunkType = 1<<15 | 77
	for _, s := range []string{"0000001c 0000", "0000001c 0004" + ascii("full"), "0000001c 0004" + ascii("full") + "0102030405060708 ff"} {
		got, err := wire.ParseChunkFailure(unknown, unhex(t, s))
		if err != nil || got.Errno != wire.ENOSPC {
			t.Errorf("%s: got %+v and error %v, want NBD_ENOSPC", s, got, err)
		}
	}
	for _, s := range []string{"", "00", "0000001c", "0000001c 00"} {
		if got, err := wire.ParseChunkFailure(unknown, unhex(t, s)); !errors.Is(err, wire.ErrMalformed) {
			t.Errorf("%q: got %+v and error %v, want ErrMalformed", s, got, err)
		}
	}
}

func TestIsErrorChunk(t *testing.T) {
	for typ, want := range map[wire.ChunkType]bool{
		wire.ChunkNone: false, wire.ChunkOffsetData: false, wire.ChunkOffsetHole: false, wire.ChunkBlockStatus: false,
		wire.ChunkBlockStatusExt: false, wire.ChunkError: true, wire.ChunkErrorOffset: true,
		1<<15 | 77: true, 77: false, 1 << 15: true,
	} {
		if got := typ.IsError(); got != want {
			t.Errorf("%v: got %v, want %v", typ, got, want)
		}
	}
}

// TestKnownErrno checks that unknown numbers count as EINVAL, and that known ones do not
// change.
func TestKnownErrno(t *testing.T) {
	for _, e := range []wire.Errno{0, 1, 5, 12, 22, 28, 75, 95, 108} {
		if got := e.Known(); got != e {
			t.Errorf("%v: got %v, want the same", e, got)
		}
	}
	for _, e := range []wire.Errno{2, 4, 6, 11, 23, 27, 30, 61, 107, 109, 1 << 31, 1<<32 - 1} {
		if got := e.Known(); got != wire.EINVAL {
			t.Errorf("%v: got %v, want NBD_EINVAL", e, got)
		}
	}
}
