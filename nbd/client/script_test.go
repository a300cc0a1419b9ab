package client

import (
	"encoding/binary"
	"runtime"
	"testing"

	"xapi-nbd/nbd/wire"
)

// allFlags advertises every command.
const allFlags = wire.FlagHasFlags | wire.FlagSendFlush | wire.FlagSendFUA | wire.FlagSendTrim |
	wire.FlagSendWriteZeroes | wire.FlagSendCache | wire.FlagSendFastZero

func (s *script) ack(opt wire.Option) {
	s.send(wire.AppendOptionReply(nil, opt, wire.RepAck, nil))
}

func (s *script) refuse(opt wire.Option, typ wire.OptionReply) {
	s.send(wire.AppendOptionReply(nil, opt, typ, nil))
}

// want receives one option, which must be this one, and returns its data.
func (s *script) want(t testing.TB, opt wire.Option) []byte {
	hdr, err := wire.ParseOptionHeader((*[wire.OptionHeaderLen]byte)(s.receive(wire.OptionHeaderLen)))
	if err != nil || hdr.Option != opt {
		t.Errorf("client sent %v (error %v), want %v", hdr.Option, err, opt)
		runtime.Goexit()
	}
	return s.receive(int(hdr.Length))
}

// replies negotiates a reply mode with a client that asks for every one.
func (s *script) replies(t testing.TB, mode replyMode) {
	s.greet()
	s.want(t, wire.OptExtendedHeaders)
	if mode == extendedHeaders {
		s.ack(wire.OptExtendedHeaders)
		return
	}
	s.refuse(wire.OptExtendedHeaders, wire.RepErrUnsup)
	s.want(t, wire.OptStructuredReply)
	if mode == structuredReplies {
		s.ack(wire.OptStructuredReply)
		return
	}
	s.refuse(wire.OptStructuredReply, wire.RepErrUnsup)
}

// exports negotiates an export, with contexts if the client asks for some.
func (s *script) exports(t testing.TB, mode replyMode, info wire.ExportInfo, contexts ...wire.MetaContext) {
	s.replies(t, mode)
	if contexts != nil {
		s.want(t, wire.OptSetMetaContext)
		for _, m := range contexts {
			s.send(wire.AppendOptionReply(nil, wire.OptSetMetaContext, wire.RepMetaContext, m.Append(nil)))
		}
		s.ack(wire.OptSetMetaContext)
	}
	s.want(t, wire.OptGo)
	if info.BlockSizes != (wire.BlockSizes{}) {
		s.send(goReply(wire.RepInfo, info.AppendInfo(nil, wire.InfoBlockSize)))
	}
	s.send(goReply(wire.RepInfo, info.AppendInfo(nil, wire.InfoExport)), goReply(wire.RepAck, nil))
}

var mebibyte = wire.ExportInfo{Size: 1 << 20, Flags: allFlags}

// requestIn receives a request, compact or extended.
func (s *script) requestIn(mode replyMode) wire.Request {
	if mode != extendedHeaders {
		return s.request()
	}
	r, err := wire.ParseExtendedRequest((*[wire.ExtendedRequestLen]byte)(s.receive(wire.ExtendedRequestLen)))
	if err != nil {
		runtime.Goexit()
	}
	return r
}

const done = wire.ChunkFlagDone

// chunk returns a chunk of the reply to r.
func chunk(mode replyMode, r wire.Request, flags wire.ChunkFlags, typ wire.ChunkType, payload []byte) []byte {
	c := wire.Chunk{Flags: flags, Type: typ, Cookie: r.Cookie, Offset: r.Offset, Length: uint64(len(payload))}
	if mode == extendedHeaders {
		var b [wire.ExtendedChunkLen]byte
		wire.PutExtendedChunk(&b, c)
		return append(b[:], payload...)
	}
	var b [wire.ChunkLen]byte
	wire.PutChunk(&b, c)
	return append(b[:], payload...)
}

// dataAt returns the payload of an OFFSET_DATA chunk with the pattern.
func dataAt(off, n int) []byte {
	return append(binary.BigEndian.AppendUint64(nil, uint64(off)), patternOf(int64(off), n)...)
}

func holeAt(off, n int) []byte { return wire.AppendHole(nil, uint64(off), uint32(n)) }

// everyMode runs a test with structured replies and with extended headers.
func everyMode(t *testing.T, run func(t *testing.T, mode replyMode)) {
	t.Run("structured", func(t *testing.T) { run(t, structuredReplies) })
	t.Run("extended", func(t *testing.T) { run(t, extendedHeaders) })
}
