package wire_test

import (
	"strings"
	"testing"

	"xapi-nbd/nbd/wire"
)

func parseExtendedRequest(b []byte) (any, error) { return wire.ParseExtendedRequest((*[32]byte)(b)) }
func parseExtendedChunk(b []byte) (any, error)   { return wire.ParseExtendedChunk((*[32]byte)(b)) }

// appendExtendedChunk hands Put a buffer that was used before.
func appendExtendedChunk(b []byte, c wire.Chunk) []byte {
	m := [32]byte([]byte(strings.Repeat("\xee", 32)))
	wire.PutExtendedChunk(&m, c)
	return append(b, m[:]...)
}

func extendedChunkAppender(c wire.Chunk) func([]byte) []byte {
	return func(b []byte) []byte { return appendExtendedChunk(b, c) }
}

var (
	extendedZeroes = wire.Request{Flags: wire.CmdFlagNoHole, Command: wire.CmdWriteZeroes,
		Cookie: 0x1122334455667788, Offset: 0x10000000200, Length: 0x20000000000}
	extendedWrite = wire.Request{Flags: wire.CmdFlagPayloadLen | wire.CmdFlagFUA, Command: wire.CmdWrite, Cookie: 1, Length: 4096}
	everyBit      = wire.Request{Flags: 0xffff, Command: 0xffff, Cookie: 1<<64 - 1, Offset: 1<<64 - 1, Length: 1<<64 - 1}

	extendedStatus = wire.Chunk{Flags: wire.ChunkFlagDone, Type: wire.ChunkBlockStatusExt,
		Cookie: 0x1122334455667788, Offset: 0x10000000200, Length: 24}
	extendedEveryBit = wire.Chunk{Flags: 0xffff, Type: 0xffff, Cookie: 1<<64 - 1, Offset: 1<<64 - 1, Length: 1<<64 - 1}
)

var extendedMessages = []fixedMessage{{
	name: "extended request", bytes: "21e41c71 0002 0006 1122334455667788 0000010000000200 0000020000000000",
	append: extendedZeroes.AppendExtended, parse: parseExtendedRequest, want: extendedZeroes,
	magic: []int{0, 4},
}, {
	name: "extended request with a payload", bytes: "21e41c71 0021 0001 0000000000000001 0000000000000000 0000000000001000",
	append: extendedWrite.AppendExtended, parse: parseExtendedRequest, want: extendedWrite,
}, {
	name: "extended request, every bit set", bytes: "21e41c71 ffff ffff ffffffffffffffff ffffffffffffffff ffffffffffffffff",
	append: everyBit.AppendExtended, parse: parseExtendedRequest, want: everyBit,
}, {
	name: "extended chunk", bytes: "6e8a278c 0001 0006 1122334455667788 0000010000000200 0000000000000018",
	append: extendedChunkAppender(extendedStatus), parse: parseExtendedChunk, want: extendedStatus,
	magic: []int{0, 4},
}, {
	name: "extended chunk, every bit set", bytes: "6e8a278c ffff ffff ffffffffffffffff ffffffffffffffff ffffffffffffffff",
	append: extendedChunkAppender(extendedEveryBit), parse: parseExtendedChunk, want: extendedEveryBit,
}}

// TestHeadersNotMixedUp checks that the parser of one kind of header does not accept another,
// although the fields after the magic number begin alike.
func TestHeadersNotMixedUp(t *testing.T) {
	parsers := map[string]func([]byte) (any, error){
		"25609513": func(b []byte) (any, error) { return wire.ParseRequest((*[28]byte)(b)) },
		"21e41c71": parseExtendedRequest,
		"67446698": func(b []byte) (any, error) { return wire.ParseSimpleReply((*[16]byte)(b)) },
		"668e33ef": parseChunk,
		"6e8a278c": parseExtendedChunk,
	}
	lengths := map[string]int{"25609513": 28, "21e41c71": 32, "67446698": 16, "668e33ef": 20, "6e8a278c": 32}
	for magic := range parsers {
		for own, parse := range parsers {
			b := append(unhex(t, magic), make([]byte, 28)...)
			if got, err := parse(b[:lengths[own]]); (err == nil) != (magic == own) {
				t.Errorf("magic %s where %s belongs: got %+v and error %v", magic, own, got, err)
			}
		}
	}
}
