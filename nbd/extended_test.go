package nbd

import (
	"bytes"
	"context"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"

	"xapi-nbd/nbd/wire"
)

// Lengths of 64 bits reach the device as they are.
func TestExtendedLengths(t *testing.T) {
	const size = 1 << 42
	tests := []struct {
		req  wire.Request
		want string
	}{
		{wire.Request{Command: wire.CmdWriteZeroes, Offset: 1 << 33, Length: 1 << 40}, "zero 8589934592+1099511627776 false false"},
		{wire.Request{Command: wire.CmdWriteZeroes, Length: size}, "zero 0+4398046511104 false false"},
		{wire.Request{Command: wire.CmdTrim, Offset: 1 << 41, Length: 1 << 41}, "trim 2199023255552+2199023255552"},
		{wire.Request{Command: wire.CmdCache, Length: 1<<32 + 1}, "cache 0+4294967297"},
	}
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		d := &writableDevice{fakeDevice: newDevice(size)}
		s.serve(boundlessDevice{d})
		p := s.chunked(wire.OptExtendedHeaders, "a")
		for _, tt := range tests {
			p.request(tt.req, nil)
			if c, _ := p.chunk(tt.req); c.Type != wire.ChunkNone {
				t.Errorf("%v of %d bytes: got %v", tt.req.Command, tt.req.Length, c.Type)
			}
			if got := strings.Join(d.took(), ", "); got != tt.want {
				t.Errorf("the device was asked for %q, want %q", got, tt.want)
			}
		}
		// Requests that transfer data have the advertised limit.
		if got := p.fails(wire.Request{Command: wire.CmdRead, Length: 1 << 33}, nil); got != wire.EINVAL {
			t.Errorf("READ of 8 GiB: %v, want %v", got, wire.EINVAL)
		}
	})
}

// boundlessDevice is larger than memory: it takes notes only.
type boundlessDevice struct{ *writableDevice }

func (d boundlessDevice) Trim(off, n int64) error { return d.note(nil, "trim %d+%d", off, n) }

func (d boundlessDevice) WriteZeroes(off, n int64, noHole, fast bool) error {
	return d.note(nil, "zero %d+%d %v %v", off, n, noHole, fast)
}

func (d boundlessDevice) Cache(off, n int64) error { return d.note(nil, "cache %d+%d", off, n) }

// Payloads of requests that must not have one are read and dropped, whatever their content
// and length.
func TestExtendedPayloadsAreConsumed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		d := newWritable(1 << 20)
		s.serve(capableDevice{d})
		p := s.chunked(wire.OptExtendedHeaders, "a")
		disc := wire.Request{Command: wire.CmdDisc}.AppendExtended(nil)
		for _, c := range []wire.Command{wire.CmdRead, wire.CmdFlush, wire.CmdTrim, wire.CmdCache, wire.CmdWriteZeroes, wire.CmdBlockStatus, wire.CmdResize, 999} {
			for _, n := range []int{1, 2, 1000, 40000} {
				payload := bytes.Repeat(disc, n)
				r := wire.Request{Command: c, Flags: wire.CmdFlagPayloadLen, Cookie: uint64(n), Offset: 512, Length: uint64(len(payload))}
				if got := p.fails(r, payload); got != wire.EINVAL {
					t.Errorf("%v with a payload of %d bytes: %v, want %v", c, len(payload), got, wire.EINVAL)
				}
			}
		}
		if got := d.took(); len(got) != 0 {
			t.Errorf("the device was asked for %q, want nothing", got)
		}
		p.content(ranged(wire.CmdRead, 0, 0, 512))
	})
}

// WRITE has a payload with and without the flag that says so.
func TestExtendedWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		d := newWritable(1 << 20)
		s.serve(capableDevice{d})
		p := s.chunked(wire.OptExtendedHeaders, "a")
		var want [1 << 20]byte
		r := rand.New(rand.NewPCG(1, 1))
		for i := range uint64(50) {
			off := r.IntN(len(want))
			data := patternOf(int64(i), 1+r.IntN(min(len(want)-off, 100_000)))
			req := ranged(wire.CmdWrite, wire.CommandFlags(i%2)*wire.CmdFlagPayloadLen, off, len(data))
			req.Cookie = i
			p.request(req, data)
			if c, _ := p.chunk(req); c.Type != wire.ChunkNone {
				t.Fatalf("got %v, want success", c.Type)
			}
			copy(want[off:], data)
		}
		if !bytes.Equal(d.content(), want[:]) {
			t.Error("the device does not hold what was written")
		}
	})
}

// The payload of BLOCK_STATUS says which range, and which contexts.
func TestExtendedStatusFilter(t *testing.T) {
	tests := []struct {
		name    string
		payload []byte
		want    wire.Errno
	}{
		{"our context", wire.StatusFilter{Length: 512, IDs: []uint32{baseAllocationID}}.Append(nil), wire.Success},
		{"up to the end", wire.StatusFilter{Length: 1<<20 - 512, IDs: []uint32{baseAllocationID}}.Append(nil), wire.Success},
		{"past the end", wire.StatusFilter{Length: 1 << 20, IDs: []uint32{baseAllocationID}}.Append(nil), wire.EINVAL},
		{"absurd length", wire.StatusFilter{Length: 1<<64 - 1, IDs: []uint32{baseAllocationID}}.Append(nil), wire.EINVAL},
		{"of nothing", wire.StatusFilter{IDs: []uint32{baseAllocationID}}.Append(nil), wire.EINVAL},
		{"no context", wire.StatusFilter{Length: 512}.Append(nil), wire.EINVAL},
		{"unknown context", wire.StatusFilter{Length: 512, IDs: []uint32{0}}.Append(nil), wire.EINVAL},
		{"known and unknown", wire.StatusFilter{Length: 512, IDs: []uint32{baseAllocationID, 7}}.Append(nil), wire.EINVAL},
		{"twice", wire.StatusFilter{Length: 512, IDs: []uint32{baseAllocationID, baseAllocationID}}.Append(nil), wire.EINVAL},
		{"no payload", nil, wire.EINVAL},
		{"cut short", make([]byte, 7), wire.EINVAL},
		{"half a context", make([]byte, 14), wire.EINVAL},
		{"long", make([]byte, maxFilter), wire.EINVAL},
		{"too long", make([]byte, maxFilter+4), wire.EINVAL},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newTestServer(t).chunked(wire.OptExtendedHeaders, "a")
				r := wire.Request{Command: wire.CmdBlockStatus, Flags: wire.CmdFlagPayloadLen, Cookie: 9, Offset: 512, Length: uint64(len(tt.payload))}
				if tt.want == wire.Success {
					p.status(r, tt.payload)
				} else if got := p.fails(r, tt.payload); got != tt.want {
					t.Errorf("got %v, want %v", got, tt.want)
				}
				p.content(ranged(wire.CmdRead, 0, 0, 512))
			})
		})
	}
}

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
