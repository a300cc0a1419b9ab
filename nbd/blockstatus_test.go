package nbd

import (
	"errors"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"

	"xapi-nbd/nbd/wire"
)

// status sends a BLOCK_STATUS and receives its extents.
func (p *chunked) status(r wire.Request, payload []byte) []wire.Extent {
	p.t.Helper()
	p.request(r, payload)
	c, b := p.chunk(r)
	want := wire.ChunkBlockStatus
	if p.extended {
		want = wire.ChunkBlockStatusExt
	}
	id, extents, err := wire.ParseBlockStatus(c.Type, b)
	if c.Type != want || c.Flags != wire.ChunkFlagDone || id != baseAllocationID || err != nil {
		p.t.Fatalf("got %v with flags %v for context %d (%v), want one %v for context %d", c.Type, c.Flags, id, err, want, baseAllocationID)
	}
	return extents
}

// TestBlockStatusExtents: invalid extents of the device are changed to valid ones.
func TestBlockStatusExtents(t *testing.T) {
	const hole = wire.StateHole | wire.StateZero
	e := func(pairs ...uint64) (extents []wire.Extent) {
		for i := 0; i < len(pairs); i += 2 {
			extents = append(extents, wire.Extent{Length: pairs[i], Status: pairs[i+1]})
		}
		return extents
	}
	const size = 1 << 20
	tests := []struct {
		name   string
		device []wire.Extent
		off, n int
		reqOne bool
		want   []wire.Extent
	}{
		{"as it is", e(4096, 0, 4096, hole), 0, 8192, false, e(4096, 0, 4096, hole)},
		{"longer than asked for", e(4096, 0, 65536, hole), 0, 8192, false, e(4096, 0, 65536, hole)},
		{"much longer", e(4096, 0, 65536, hole, 4096, 0, 4096, hole), 0, 8192, false, e(4096, 0, 65536, hole)},
		{"exactly, and one more", e(8192, 0, 65536, hole), 0, 8192, false, e(8192, 0)},
		{"shorter than asked for", e(4096, hole), 0, 8192, false, e(4096, hole)},
		{"alike", e(512, 0, 512, 0, 512, hole, 512, hole, 512, 2), 0, 2560, false, e(1024, 0, 1024, hole, 512, 2)},
		{"alike beyond what was asked for", e(4096, 0, 4096, 0, 4096, 0), 0, 4096, false, e(12288, 0)},
		{"empty ones", e(0, hole, 512, 0, 0, hole, 512, 0, 0, 2), 0, 1024, false, e(1024, 0)},
		{"nothing", nil, 0, 1024, false, e(1024, 0)},
		{"nothing but empty ones", e(0, 0, 0, hole), 0, 1024, false, e(1024, 0)},
		{"behind the end", e(4096, 0, 1<<40, hole), size - 8192, 8192, false, e(4096, 0, 4096, hole)},
		{"far behind the end", e(4096, 0, 1<<63, hole, 1<<63, 0), size - 8192, 8192, false, e(4096, 0, 4096, hole)},
		{"one", e(4096, 0, 4096, hole), 0, 8192, true, e(4096, 0)},
		{"one, too long", e(65536, hole, 4096, 0), 0, 8192, true, e(8192, hole)},
		{"one of many alike", e(512, 0, 512, 0, 512, hole), 0, 8192, true, e(1024, 0)},
		{"one of nothing", nil, 0, 8192, true, e(8192, 0)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, opt := range chunkModes {
				synctest.Test(t, func(t *testing.T) {
					s := newTestServer(t)
					s.serve(&sparseDevice{newDevice(size), func(off, n int64) ([]wire.Extent, error) {
						if off != int64(tt.off) || n != int64(tt.n) {
							t.Errorf("device was asked for %d+%d, want %d+%d", off, n, tt.off, tt.n)
						}
						return slices.Clone(tt.device), nil
					}})
					r := ranged(wire.CmdBlockStatus, 0, tt.off, tt.n)
					if tt.reqOne {
						r.Flags = wire.CmdFlagReqOne
					}
					if got := s.chunked(opt, "a").status(r, nil); !slices.Equal(got, tt.want) {
						t.Errorf("%v: got %v, want %v", opt, got, tt.want)
					}
				})
			}
		})
	}
}

// Extents that 32 bits do not hold are cut without extended headers; the client
// asks again for the rest.
func TestBlockStatusOfLargeExports(t *testing.T) {
	const size = 1 << 40
	device := func(t *testing.T) *sparseDevice {
		return &sparseDevice{newDevice(size), func(off, n int64) ([]wire.Extent, error) {
			return []wire.Extent{{Length: 4096}, {Length: uint64(size - off - 4096), Status: 3}}, nil
		}}
	}
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.serve(device(t))
		got := s.chunked(wire.OptStructuredReply, "a").status(wire.Request{Command: wire.CmdBlockStatus, Length: 1<<32 - 1}, nil)
		want := []wire.Extent{{Length: 4096}, {Length: longExtent, Status: 3}}
		if !slices.Equal(got, want) {
			t.Errorf("32 bits: got %v, want %v", got, want)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.serve(device(t))
		got := s.chunked(wire.OptExtendedHeaders, "a").status(wire.Request{Command: wire.CmdBlockStatus, Length: size}, nil)
		want := []wire.Extent{{Length: 4096}, {Length: size - 4096, Status: 3}}
		if !slices.Equal(got, want) {
			t.Errorf("64 bits: got %v, want %v", got, want)
		}
	})
}

// TestBlockStatusExtentLimit: the number of extents in a reply is limited.
func TestBlockStatusExtentLimit(t *testing.T) {
	for _, opt := range chunkModes {
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer(t)
			s.serve(&sparseDevice{newDevice(1 << 30), func(_, n int64) ([]wire.Extent, error) {
				extents := make([]wire.Extent, n/512)
				for i := range extents {
					extents[i] = wire.Extent{Length: 512, Status: uint64(i%2) * 3}
				}
				return extents, nil
			}})
			p := s.chunked(opt, "a")
			got := p.status(ranged(wire.CmdBlockStatus, 0, 0, 1<<30), nil)
			if len(got) != maxExtents {
				t.Errorf("%v: %d extents, want %d", opt, len(got), maxExtents)
			}
			if next := p.status(ranged(wire.CmdBlockStatus, 0, maxExtents*512, 1024), nil); len(next) != 2 {
				t.Errorf("%v: behind them: %v, want two extents", opt, next)
			}
		})
	}
}

// TestBlockStatusWalk: a client that walks along the device gets right extents and makes
// progress, with any lengths of its requests.
func TestBlockStatusWalk(t *testing.T) {
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) {
			const size = 70_001
			r := rand.New(rand.NewPCG(seed, 2))
			d, data := randomSparse(r, size)
			s := newTestServer(t)
			s.serve(d)
			p := s.chunked(chunkModes[seed%2], "a")
			for off := 0; off < size; {
				n := 1 + r.IntN(size-off)
				one := wire.CommandFlags(r.IntN(2)) * wire.CmdFlagReqOne
				extents := p.status(ranged(wire.CmdBlockStatus, one, off, n), nil)
				at := off
				for i, e := range extents {
					end := at + int(e.Length)
					switch {
					case end > size, i < len(extents)-1 && end >= off+n:
						t.Fatalf("%d bytes at %d: extents %v", n, off, extents)
					case one != 0 && (len(extents) != 1 || end > off+n):
						t.Fatalf("%d bytes at %d with REQ_ONE: extents %v", n, off, extents)
					case i > 0 && e.Status == extents[i-1].Status:
						t.Fatalf("%d bytes at %d: neighbours are alike: %v", n, off, extents)
					case e.Status&wire.StateZero != 0 && slices.ContainsFunc(data[at:end], func(b byte) bool { return b != 0 }):
						t.Fatalf("%d bytes at %d are said to be zeroes, and are not", e.Length, at)
					}
					at = end
				}
				off = at
			}
		})
	}
}

// TestFailedBlockStatus: an error of Extents fails the request.
func TestFailedBlockStatus(t *testing.T) {
	for _, opt := range chunkModes {
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer(t)
			d := &sparseDevice{newDevice(1 << 20), func(int64, int64) ([]wire.Extent, error) { return nil, errors.New("broken") }}
			s.serve(d)
			p := s.chunked(opt, "a")
			if got := p.fails(ranged(wire.CmdBlockStatus, 0, 0, 512), nil); got != wire.EIO {
				t.Errorf("%v: got %v, want %v", opt, got, wire.EIO)
			}
			p.content(ranged(wire.CmdRead, 0, 0, 512))
		})
	}
}

// TestSelectionOfContexts: the last SET_META_CONTEXT counts, and only for its export.
func TestSelectionOfContexts(t *testing.T) {
	set := func(p *peer, export string, queries ...string) wire.OptionReply {
		p.option(wire.OptSetMetaContext, wire.MetaContextRequest{Export: export, Queries: queries}.Append(nil))
		for {
			if typ, _ := p.reply(wire.OptSetMetaContext); typ != wire.RepMetaContext {
				return typ
			}
		}
	}
	const base = wire.BaseAllocation
	tests := []struct {
		name  string
		after func(p *peer) // and after base:allocation was selected for "a"
		works bool
	}{
		{"nothing", func(*peer) {}, true},
		{"the same again", func(p *peer) { set(p, "a", base) }, true},
		{"another export", func(p *peer) { set(p, "b", base) }, false},
		{"another export and back", func(p *peer) { set(p, "b", base); set(p, "a", base) }, true},
		{"no queries", func(p *peer) { set(p, "a") }, false},
		{"a wildcard", func(p *peer) { set(p, "a", "base:") }, false},
		{"unknown names", func(p *peer) { set(p, "a", "x:y") }, false},
		{"a malformed one", func(p *peer) { p.refused(wire.OptSetMetaContext, []byte{1}, wire.RepErrInvalid) }, false},
		{"one that is too long", func(p *peer) { p.refused(wire.OptSetMetaContext, make([]byte, maxOptionData+1), wire.RepErrTooBig) }, false},
		{"a list", func(p *peer) {
			p.refused(wire.OptListMetaContext, wire.MetaContextRequest{Export: "a", Queries: []string{"x:"}}.Append(nil), wire.RepAck)
		}, true},
		{"INFO of another export", func(p *peer) { p.info(wire.OptInfo, "b") }, true},
		{"an unknown option", func(p *peer) { p.refused(4711, nil, wire.RepErrUnsup) }, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newTestServer(t).connect()
				p.greet(fixedNoZeroes)
				p.refused(wire.OptStructuredReply, nil, wire.RepAck)
				p.selects("a")
				tt.after(p)
				p.goTo("a")
				c := &chunked{p, false}
				r := ranged(wire.CmdBlockStatus, 0, 0, 512)
				if tt.works {
					c.status(r, nil)
				} else if got := c.fails(r, nil); got != wire.EINVAL {
					t.Errorf("got %v, want %v", got, wire.EINVAL)
				}
			})
		})
	}
}
