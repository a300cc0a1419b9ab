package nbd

import (
	"bytes"
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

// TestExtendedPayloadsAreConsumed: payloads of requests that must not have one are read and
// dropped, with any content and length.
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
			t.Error("the device does not contain the written data")
		}
	})
}
