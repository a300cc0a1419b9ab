//go:build !race

// The race detector allocates on its own account, so this runs without it: see
// the Makefile.

package wire_test

import (
	"testing"

	"xapi-nbd/nbd/wire"
)

// Results go here, so that the compiler keeps the calls.
var (
	sinkGreeting wire.HandshakeFlags
	sinkOption   wire.OptionHeader
	sinkReply    wire.OptionReplyHeader
	sinkRequest  wire.Request
	sinkSimple   wire.SimpleReply
	sinkChunk    wire.Chunk
	sinkSize     uint64
	sinkFlags    wire.ClientFlags
	sinkBytes    [16]byte
	sinkHeader   [wire.ChunkLen]byte
	sinkExtended [wire.ExtendedChunkLen]byte
	sinkErr      error
)

// TestNoAllocations checks that parsing and writing of requests and options allocate nothing.
func TestNoAllocations(t *testing.T) {
	greeting := (*[18]byte)(unhex(t, ascii("NBDMAGIC")+ascii("IHAVEOPT")+"0003"))
	flags := (*[4]byte)(unhex(t, "00000003"))
	option := (*[16]byte)(unhex(t, ascii("IHAVEOPT")+"00000003 00000000"))
	reply := (*[20]byte)(unhex(t, "0003e889045565a9 00000007 00000001 00000000"))
	exportName := (*[10]byte)(unhex(t, "0000000000000200 0001"))
	request := (*[28]byte)(unhex(t, "25609513 0000 0000 0000000000000001 0000000000000200 00001000"))
	simple := (*[16]byte)(unhex(t, "67446698 00000000 0102030405060708"))
	chunk := (*[20]byte)(unhex(t, "668e33ef 0001 0001 0102030405060708 00001008"))
	extRequest := (*[32]byte)(unhex(t, "21e41c71 0000 0000 0000000000000001 0000000000000200 0000000000001000"))
	extChunk := (*[32]byte)(unhex(t, "6e8a278c 0001 0001 0102030405060708 0000000000000200 0000000000001008"))
	hole := unhex(t, "0000000000000200 00001000")
	room := make([]byte, 0, wire.ExtendedRequestLen)

	for name, f := range map[string]func(){
		"ParseGreeting":          func() { sinkGreeting, sinkErr = wire.ParseGreeting(greeting) },
		"ParseClientFlags":       func() { sinkFlags = wire.ParseClientFlags(flags) },
		"ParseOptionHeader":      func() { sinkOption, sinkErr = wire.ParseOptionHeader(option) },
		"ParseOptionReplyHeader": func() { sinkReply, sinkErr = wire.ParseOptionReplyHeader(reply) },
		"ParseExportNameReply":   func() { sinkSize, _ = wire.ParseExportNameReply(exportName) },
		"ParseRequest":           func() { sinkRequest, sinkErr = wire.ParseRequest(request) },
		"ParseSimpleReply":       func() { sinkSimple, sinkErr = wire.ParseSimpleReply(simple) },
		"PutSimpleReply":         func() { wire.PutSimpleReply(&sinkBytes, wire.EIO, 7) },
		"Request.Append":         func() { sinkRequest.Append(room) },
		"ParseChunk":             func() { sinkChunk, sinkErr = wire.ParseChunk(chunk) },
		"PutChunk":               func() { wire.PutChunk(&sinkHeader, sinkChunk) },
		"AppendHole":             func() { wire.AppendHole(room, 512, 4096) },
		"ParseHole":              func() { sinkSize, _, sinkErr = wire.ParseHole(hole) },
		"ParseExtendedRequest":   func() { sinkRequest, sinkErr = wire.ParseExtendedRequest(extRequest) },
		"Request.AppendExtended": func() { sinkRequest.AppendExtended(room) },
		"ParseExtendedChunk":     func() { sinkChunk, sinkErr = wire.ParseExtendedChunk(extChunk) },
		"PutExtendedChunk":       func() { wire.PutExtendedChunk(&sinkExtended, sinkChunk) },
	} {
		if got := testing.AllocsPerRun(100, f); got != 0 {
			t.Errorf("%s: got %v allocations per call, want 0", name, got)
		}
		if sinkErr != nil {
			t.Errorf("%s: got error %v, want none", name, sinkErr)
		}
	}
}

func BenchmarkParseRequest(b *testing.B) {
	request := (*[28]byte)(unhex(b, "25609513 0000 0000 0000000000000001 0000000000000200 00001000"))
	b.ReportAllocs()
	for b.Loop() {
		sinkRequest, sinkErr = wire.ParseRequest(request)
	}
}

func BenchmarkPutSimpleReply(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		wire.PutSimpleReply(&sinkBytes, wire.Success, 7)
	}
}

func BenchmarkParseInfoRequest(b *testing.B) {
	data := unhex(b, "00000004"+ascii("disk")+"0002 0003 0001")
	b.ReportAllocs()
	for b.Loop() {
		_, sinkErr = wire.ParseInfoRequest(data)
	}
}
