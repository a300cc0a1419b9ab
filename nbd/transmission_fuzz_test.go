package nbd

import (
	"context"
	"testing"
	"testing/synctest"

	"xapi-nbd/nbd/wire"
)

// FuzzServerTransmission sends bytes of a client that has negotiated, in each
// of the modes, to a device that can do everything.
func FuzzServerTransmission(f *testing.F) {
	every := func(flags wire.CommandFlags, add func(b []byte, r wire.Request) []byte) (b []byte) {
		for c := wire.CmdWriteZeroes + 3; c > 0; c-- {
			r := wire.Request{Command: c - 1, Flags: flags, Cookie: uint64(c), Offset: 4096, Length: 32}
			if r.Command == wire.CmdDisc {
				continue
			}
			b = add(b, r)
			if r.Command == wire.CmdWrite || flags&wire.CmdFlagPayloadLen != 0 {
				b = append(b, wire.StatusFilter{Length: 512, IDs: []uint32{1, 2, 3, 4, 5, 6}}.Append(nil)...)
			}
		}
		return b
	}
	compact := func(b []byte, r wire.Request) []byte { return r.Append(b) }
	extended := func(b []byte, r wire.Request) []byte { return r.AppendExtended(b) }
	for _, flags := range []wire.CommandFlags{0, wire.CmdFlagFUA, wire.CmdFlagDF, wire.CmdFlagReqOne, wire.CmdFlagNoHole | wire.CmdFlagFastZero} {
		f.Add(uint8(0), every(flags, compact))
		f.Add(uint8(1), every(flags, compact))
		f.Add(uint8(2), every(flags, extended))
		f.Add(uint8(2), every(flags|wire.CmdFlagPayloadLen, extended))
	}
	f.Add(uint8(2), wire.Request{Command: wire.CmdWrite, Flags: wire.CmdFlagPayloadLen, Length: 1 << 63}.AppendExtended(nil))
	f.Add(uint8(2), wire.Request{Command: wire.CmdWriteZeroes, Offset: 1 << 63, Length: 1 << 63}.AppendExtended(nil))
	f.Add(uint8(1), wire.Request{Command: wire.CmdBlockStatus, Offset: 1<<64 - 1, Length: 1<<32 - 1}.Append(nil))
	f.Fuzz(func(t *testing.T, mode uint8, b []byte) {
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer(t)
			s.MaxInflightBytes = 1 << 20
			d := newWritable(100_003)
			s.exports.open = func(context.Context, Peer, string) (Device, error) {
				return struct {
					capableDevice
					BlockSizer
					Extenter
				}{capableDevice{d}, &sizedDevice{nil, 512, 4096, 64 << 10}, &sparseDevice{nil, func(off, n int64) ([]wire.Extent, error) {
					return []wire.Extent{{Length: uint64(n+1) / 2}, {Length: uint64(n), Status: wire.StateHole}}, nil
				}}}, nil
			}
			p := s.connect()
			p.greet(fixedNoZeroes)
			if m := replyMode(mode % 3); m != simpleReplies {
				p.refused(chunkModes[m-1], nil, wire.RepAck)
				p.selects("a")
			}
			p.goTo("a")
			p.feed(b)
			if d.closes() != 1 || len(d.breaches) > 0 {
				t.Errorf("device closed %d times, and %q", d.closes(), d.breaches)
			}
		})
	})
}
