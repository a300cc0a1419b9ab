package nbd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"syscall"
	"testing"
	"testing/synctest"

	"xapi-nbd/nbd/wire"
)

// selects negotiates base:allocation for an export.
func (p *peer) selects(export string) {
	p.t.Helper()
	p.option(wire.OptSetMetaContext, wire.MetaContextRequest{Export: export, Queries: []string{wire.BaseAllocation}}.Append(nil))
	p.want(wire.OptSetMetaContext, wire.RepMetaContext)
	p.want(wire.OptSetMetaContext, wire.RepAck)
}

// chunked is a peer in the transmission phase that gets its replies in chunks.
type chunked struct {
	*peer
	extended bool
}

// chunkModes are the options that a chunked peer may begin with.
var chunkModes = []wire.Option{wire.OptStructuredReply, wire.OptExtendedHeaders}

// chunked negotiates replies in chunks, and base:allocation.
func (s *testServer) chunked(opt wire.Option, name string) *chunked {
	s.t.Helper()
	return s.connect().chunked(opt, name)
}

func (p *peer) chunked(opt wire.Option, name string) *chunked {
	p.t.Helper()
	p.greet(fixedNoZeroes)
	p.refused(opt, nil, wire.RepAck)
	p.selects(name)
	p.goTo(name)
	return &chunked{p, opt == wire.OptExtendedHeaders}
}

func (p *chunked) request(r wire.Request, payload []byte) {
	p.t.Helper()
	if p.extended {
		p.send(append(r.AppendExtended(nil), payload...))
		return
	}
	p.send(append(r.Append(nil), payload...))
}

// chunk receives one chunk, which must answer r.
func (p *chunked) chunk(r wire.Request) (wire.Chunk, []byte) {
	p.t.Helper()
	var c wire.Chunk
	var err error
	if p.extended {
		c, err = wire.ParseExtendedChunk((*[wire.ExtendedChunkLen]byte)(p.receive(wire.ExtendedChunkLen)))
	} else {
		c, err = wire.ParseChunk((*[wire.ChunkLen]byte)(p.receive(wire.ChunkLen)))
		c.Offset = r.Offset
	}
	switch {
	case err != nil:
		p.t.Fatal(err)
	case c.Cookie != r.Cookie || c.Offset != r.Offset:
		p.t.Fatalf("chunk for request %#x at %d, want %#x at %d", c.Cookie, c.Offset, r.Cookie, r.Offset)
	case c.Flags&^wire.ChunkFlagDone != 0:
		p.t.Fatalf("chunk with flags %v", c.Flags)
	case c.Type == wire.ChunkNone && (c.Length != 0 || c.Flags == 0):
		p.t.Fatalf("NONE with %d bytes and flags %v", c.Length, c.Flags)
	}
	return c, p.receive(int(c.Length))
}

// fails expects one error chunk and nothing else.
func (p *chunked) fails(r wire.Request, payload []byte) wire.Errno {
	p.t.Helper()
	p.request(r, payload)
	c, b := p.chunk(r)
	f, err := wire.ParseChunkFailure(c.Type, b)
	if c.Type != wire.ChunkError || err != nil || c.Flags != wire.ChunkFlagDone {
		p.t.Fatalf("%v: got %v with flags %v (%v), want one error chunk", r.Command, c.Type, c.Flags, err)
	}
	return f.Errno
}

// content is the content in the chunks of a successful READ.
type content struct {
	data   []byte
	chunks int
	holes  uint64 // bytes in holes
}

// content sends a READ and puts its chunks together. They must lie inside the
// request, follow the rules of content chunks, and cover everything once.
func (p *chunked) content(r wire.Request) content {
	p.t.Helper()
	p.request(r, nil)
	got := content{data: make([]byte, r.Length)}
	seen := make([]bool, r.Length)
	for done := false; !done; {
		c, b := p.chunk(r)
		done = c.Flags != 0
		got.chunks++
		var off, n uint64
		switch c.Type {
		case wire.ChunkOffsetData:
			if len(b) <= wire.ChunkOffsetLen {
				p.t.Fatalf("a data chunk of %d bytes", len(b))
			}
			off, b = binary.BigEndian.Uint64(b), b[wire.ChunkOffsetLen:]
			n = uint64(len(b))
		case wire.ChunkOffsetHole:
			o, length, err := wire.ParseHole(b)
			if err != nil {
				p.t.Fatal(err)
			}
			off, n, b = o, uint64(length), make([]byte, length)
			got.holes += n
		default:
			p.t.Fatalf("READ answered with %v", c.Type)
		}
		if off < r.Offset || off+n > r.Offset+r.Length {
			p.t.Fatalf("content at %d+%d, asked for %d+%d", off, n, r.Offset, r.Length)
		}
		for i := off - r.Offset; i < off-r.Offset+n; i++ {
			if seen[i] {
				p.t.Fatalf("byte %d of the request comes twice", i)
			}
			seen[i] = true
		}
		copy(got.data[off-r.Offset:], b)
	}
	if i := bytes.IndexByte(boolBytes(seen), 0); i >= 0 {
		p.t.Fatalf("byte %d of the request never came", i)
	}
	return got
}

func boolBytes(bools []bool) []byte {
	b := make([]byte, len(bools))
	for i, set := range bools {
		if set {
			b[i] = 1
		}
	}
	return b
}

// sparseDevice is a fakeDevice with holes.
type sparseDevice struct {
	*fakeDevice
	extents func(off, n int64) ([]wire.Extent, error)
}

func (d *sparseDevice) Extents(off, n int64) ([]wire.Extent, error) { return d.extents(off, n) }

// randomSparse returns a device of random runs, each of zeroes or of data, and its content. Its
// extents are right but irregular: neighbours may be equal, the last one may be too long, and
// there may be too few.
func randomSparse(r *rand.Rand, size int) (*sparseDevice, []byte) {
	data, zero := patternOf(0, size), make([]bool, size)
	for at := 0; at < size; {
		n := min(1+r.IntN(1<<(4+r.IntN(12))), size-at)
		if r.IntN(2) == 0 {
			clear(data[at : at+n])
			for i := at; i < at+n; i++ {
				zero[i] = true
			}
		}
		at += n
	}
	d := &sparseDevice{fakeDevice: newDevice(int64(size))}
	d.onRead = func(p []byte, off int64) (int, error) { return copy(p, data[off:]), nil }
	rnd := rand.New(rand.NewPCG(r.Uint64(), 0))
	d.extents = func(off, n int64) ([]wire.Extent, error) {
		var extents []wire.Extent
		for at := off; at < off+n && (len(extents) == 0 || rnd.IntN(40) > 0); {
			end := at + 1
			for end < int64(size) && zero[end] == zero[at] && rnd.IntN(5000) > 0 {
				end++
			}
			var status uint64
			if zero[at] {
				status = wire.StateZero | uint64(rnd.IntN(2))
			}
			extents = append(extents, wire.Extent{Length: uint64(end - at), Status: status})
			at = end
		}
		return extents, nil
	}
	return d, data
}

// TestSparseReads: a READ returns the device's bytes with any answer of Extents: in few chunks,
// in one with DF. A socket gets them in one write, a pipe in one for each chunk.
func TestSparseReads(t *testing.T) {
	for seed := range uint64(16) {
		synctest.Test(t, func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 1))
			const size = 70_001
			d, data := randomSparse(r, size)
			s := newTestServer(t)
			s.serve(d)
			var rec *recordingConn
			p := s.connectBy(func(nc net.Conn) net.Conn {
				rec = &recordingConn{Conn: nc}
				return rec
			}).chunked(chunkModes[seed%2], "a")
			for i := range uint64(10) {
				off := r.IntN(size)
				n := 1 + r.IntN(size-off)
				for _, df := range []wire.CommandFlags{0, wire.CmdFlagDF} {
					before := len(rec.writes)
					got := p.content(wire.Request{Command: wire.CmdRead, Flags: df, Cookie: i, Offset: uint64(off), Length: uint64(n)})
					synctest.Wait()
					switch {
					case !bytes.Equal(got.data, data[off:off+n]):
						t.Errorf("flags %v: %d bytes at %d: wrong content", df, n, off)
					case got.chunks > maxReadParts+1, df != 0 && (got.chunks != 1 || got.holes != 0):
						t.Errorf("flags %v: %d bytes at %d: %d chunks", df, n, off, got.chunks)
					case len(rec.writes) > before+got.chunks:
						t.Errorf("flags %v: a reply in %d writes", df, len(rec.writes)-before)
					}
				}
			}
			p.nc.Close()
			p.end()
		})
	}
}

// TestRangesSentAsHoles: holes are not read, and only long ones are sent as chunks of their own.
func TestRangesSentAsHoles(t *testing.T) {
	const size = 128 << 10
	tests := []struct {
		name    string
		extents []wire.Extent
		err     error
		holes   uint64
		chunks  int
	}{
		{"all of it", []wire.Extent{{Length: size, Status: 3}}, nil, size, 1},
		{"zeroes that are allocated", []wire.Extent{{Length: size, Status: wire.StateZero}}, nil, size, 1},
		{"a hole that does not read as zeroes", []wire.Extent{{Length: size, Status: wire.StateHole}}, nil, 0, 1},
		{"a short one", []wire.Extent{{Length: 4095, Status: 3}, {Length: size - 4095}}, nil, 0, 1},
		{"one just long enough", []wire.Extent{{Length: 4096, Status: 3}, {Length: size - 4096}}, nil, 4096, 2},
		{"in the middle", []wire.Extent{{Length: 5000}, {Length: 8192, Status: 3}, {Length: size - 13192}}, nil, 8192, 3},
		{"next to each other", []wire.Extent{{Length: 8192, Status: 3}, {Length: 8192, Status: 2}, {Length: size - 16384}}, nil, 16384, 2},
		{"behind the end", []wire.Extent{{Length: 8192}, {Length: 1 << 60, Status: 3}}, nil, size - 8192, 2},
		{"an answer that is too short", []wire.Extent{{Length: 8192, Status: 3}}, nil, 8192, 2},
		{"no answer", nil, nil, 0, 1},
		{"an error", nil, syscall.EIO, 0, 1},
		{"an error beside extents", []wire.Extent{{Length: size, Status: 3}}, errors.New("broken"), 0, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t)
				d := &sparseDevice{fakeDevice: newDevice(size), extents: func(int64, int64) ([]wire.Extent, error) { return tt.extents, tt.err }}
				s.serve(d)
				p := s.chunked(wire.OptStructuredReply, "a")
				got := p.content(ranged(wire.CmdRead, 0, 0, size))
				if got.holes != tt.holes || got.chunks != tt.chunks {
					t.Errorf("%d bytes of holes in %d chunks, want %d in %d", got.holes, got.chunks, tt.holes, tt.chunks)
				}
				if d.meter.finished != size-int64(tt.holes) {
					t.Errorf("%d bytes were read, want all but the holes", d.meter.finished)
				}
			})
		})
	}
}

// A READ that fails after a hole is an error without content.
func TestFailedSparseRead(t *testing.T) {
	for _, opt := range chunkModes {
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer(t)
			d := &sparseDevice{fakeDevice: newDevice(1 << 20)}
			d.onRead = func(p []byte, off int64) (int, error) {
				if off >= 512<<10 {
					return len(p) / 2, syscall.EIO
				}
				pattern(p, off)
				return len(p), nil
			}
			d.extents = func(int64, int64) ([]wire.Extent, error) {
				return []wire.Extent{{Length: 4096}, {Length: 508 << 10, Status: 3}, {Length: 512 << 10}}, nil
			}
			s.serve(d)
			p := s.chunked(opt, "a")
			if got := p.fails(ranged(wire.CmdRead, 0, 0, 1<<20), nil); got != wire.EIO {
				t.Errorf("%v: got %v, want %v", opt, got, wire.EIO)
			}
			if got := p.content(ranged(wire.CmdRead, 0, 0, 4096)).data; !bytes.Equal(got, patternOf(0, 4096)) {
				t.Errorf("%v: wrong data after a failure", opt)
			}
		})
	}
}

// TestNotSupportedIsForFastZeroOnly: only requests with FAST_ZERO get NBD_ENOTSUP, also if the
// device returns it for others.
func TestNotSupportedIsForFastZeroOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		d := newWritable(4096)
		d.before = func(string) error { return syscall.ENOTSUP }
		s.serve(capableDevice{d})
		p := s.negotiated("a")
		p.wants(wire.ENOTSUP, ranged(wire.CmdWriteZeroes, wire.CmdFlagFastZero, 0, 512), nil)
		for _, c := range []wire.Command{wire.CmdWriteZeroes, wire.CmdTrim, wire.CmdFlush, wire.CmdCache} {
			if got := p.does(ranged(c, 0, 0, 512), nil); got == wire.ENOTSUP || got == wire.Success {
				t.Errorf("%v: got %v, want another error", c, got)
			}
		}
	})
}
