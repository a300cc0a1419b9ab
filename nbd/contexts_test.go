package nbd

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"xapi-nbd/nbd/wire"
)

// contextDevice is a device with metadata contexts of its own: every context's extents
// are 4096 bytes with its number as status, then 8192 bytes with 0, and so on.
type contextDevice struct {
	*fakeDevice
	names   []string
	extents func(name string, off, n int64) ([]wire.Extent, error)
}

func (d *contextDevice) Contexts() []string { return d.names }

func (d *contextDevice) ContextExtents(name string, off, n int64) ([]wire.Extent, error) {
	return d.extents(name, off, n)
}

// newContextDevice has the contexts "x-test:dirty" and "x-test:age".
func newContextDevice() *contextDevice {
	return &contextDevice{newDevice(1 << 20), []string{"x-test:dirty", "x-test:age"},
		func(name string, off, n int64) ([]wire.Extent, error) {
			if name == "x-test:age" {
				return []wire.Extent{{Length: uint64(n), Status: 0xfedcba98}}, nil
			}
			return []wire.Extent{{Length: 4096, Status: 1}, {Length: 8192}, {Length: uint64(n), Status: 1}}, nil
		}}
}

// metaContexts sends a LIST or SET and returns the contexts in the replies.
func (p *peer) metaContexts(opt wire.Option, export string, queries ...string) []wire.MetaContext {
	p.t.Helper()
	p.option(opt, wire.MetaContextRequest{Export: export, Queries: queries}.Append(nil))
	found := []wire.MetaContext{}
	for {
		typ, data := p.reply(opt)
		switch typ {
		case wire.RepAck:
			return found
		case wire.RepMetaContext:
			m, err := wire.ParseMetaContext(data)
			if err != nil {
				p.t.Fatal(err)
			}
			found = append(found, m)
		default:
			p.t.Fatalf("got %v (%q), want contexts", typ, data)
		}
	}
}

// inChunks connects and asks for replies in chunks.
func (s *testServer) inChunks(opt wire.Option) *peer {
	s.t.Helper()
	p := s.connect()
	p.greet(fixedNoZeroes)
	p.refused(opt, nil, wire.RepAck)
	return p
}

// statuses sends a BLOCK_STATUS and returns the extents by context.
func (p *chunked) statuses(r wire.Request, payload []byte) map[uint32][]wire.Extent {
	p.t.Helper()
	p.request(r, payload)
	all := make(map[uint32][]wire.Extent)
	for {
		c, b := p.chunk(r)
		id, extents, err := wire.ParseBlockStatus(c.Type, b)
		if err != nil || all[id] != nil {
			p.t.Fatalf("got %v (%v) for context %d, of which there are extents: %v", c.Type, err, id, all[id])
		}
		all[id] = extents
		if c.Flags&wire.ChunkFlagDone != 0 {
			return all
		}
	}
}

func TestContextQueries(t *testing.T) {
	const base, dirty, age = wire.BaseAllocation, "x-test:dirty", "x-test:age"
	tests := []struct {
		queries   []string
		list, set []string
	}{
		{nil, []string{base, dirty, age}, nil},
		{[]string{"x-test:"}, []string{dirty, age}, nil},
		{[]string{"x-test:d"}, nil, nil},
		{[]string{":"}, nil, nil},
		{[]string{"base:"}, []string{base}, nil},
		{[]string{dirty}, []string{dirty}, []string{dirty}},
		{[]string{age, dirty, dirty}, []string{dirty, age}, []string{dirty, age}},
		{[]string{"x-other:dirty", base}, []string{base}, []string{base}},
		{[]string{"x-test:", base, age}, []string{base, dirty, age}, []string{base, age}},
		{[]string{"X-TEST:dirty", "dirty", ""}, nil, nil},
	}
	ids := map[string]uint32{base: 1, dirty: 2, age: 3}
	for _, tt := range tests {
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer(t)
			s.serve(newContextDevice())
			p := s.inChunks(wire.OptStructuredReply)
			for opt, names := range map[wire.Option][]string{wire.OptListMetaContext: tt.list, wire.OptSetMetaContext: tt.set} {
				want := []wire.MetaContext{}
				for _, name := range names {
					m := wire.MetaContext{Name: name}
					if opt == wire.OptSetMetaContext {
						m.ID = ids[name]
					}
					want = append(want, m)
				}
				if got := p.metaContexts(opt, "a", tt.queries...); !slices.Equal(got, want) {
					t.Errorf("%v %q: got %v, want %v", opt, tt.queries, got, want)
				}
			}
		})
	}
}

// Each context has its own extents in one reply.
func TestContextExtents(t *testing.T) {
	for _, opt := range chunkModes {
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer(t)
			s.serve(newContextDevice())
			p := s.inChunks(opt)
			p.metaContexts(wire.OptSetMetaContext, "a", wire.BaseAllocation, "x-test:age", "x-test:dirty")
			p.goTo("a")
			c := &chunked{p, opt == wire.OptExtendedHeaders}
			got := c.statuses(ranged(wire.CmdBlockStatus, 0, 0, 16384), nil)
			want := map[uint32][]wire.Extent{
				1: {{Length: 16384}},
				2: {{Length: 4096, Status: 1}, {Length: 8192}, {Length: 16384, Status: 1}},
				3: {{Length: 16384, Status: 0xfedcba98}},
			}
			if fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("%v: got %v, want %v", opt, got, want)
			}
			got = c.statuses(ranged(wire.CmdBlockStatus, wire.CmdFlagReqOne, 0, 16384), nil)
			if len(got) != 3 || fmt.Sprint(got[2]) != fmt.Sprint([]wire.Extent{{Length: 4096, Status: 1}}) {
				t.Errorf("%v with REQ_ONE: got %v", opt, got)
			}
		})
	}
}

// A client may ask for one of the contexts that it has selected.
func TestContextFilter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.serve(newContextDevice())
		p := s.inChunks(wire.OptExtendedHeaders)
		p.metaContexts(wire.OptSetMetaContext, "a", "x-test:age", "x-test:dirty")
		p.goTo("a")
		c := &chunked{p, true}
		payload := wire.StatusFilter{Length: 4096, IDs: []uint32{3}}.Append(nil)
		r := wire.Request{Command: wire.CmdBlockStatus, Flags: wire.CmdFlagPayloadLen, Length: uint64(len(payload))}
		got := c.statuses(r, payload)
		if len(got) != 1 || fmt.Sprint(got[3]) != fmt.Sprint([]wire.Extent{{Length: 4096, Status: 0xfedcba98}}) {
			t.Errorf("got %v, want context 3 only", got)
		}
	})
}

// If a context has no status for a range, or one that cannot be sent, the request fails and
// the connection goes on: no status means "unknown" in every context.
func TestContextFailures(t *testing.T) {
	wide := []wire.Extent{{Length: 4096, Status: 1 << 32}}
	tests := []struct {
		name     string
		extents  []wire.Extent
		err      error
		extended bool // whether it works with extended headers
		want     wire.Errno
	}{
		{"error", nil, errors.New("no"), false, wire.EIO},
		{"nothing", nil, nil, false, wire.EIO},
		{"only empty extents", []wire.Extent{{Status: 1}}, nil, false, wire.EIO},
		{"64 bits", wide, nil, true, wire.EIO},
		{"64 bits later", append([]wire.Extent{{Length: 512}}, wide...), nil, true, wire.EIO},
	}
	for _, tt := range tests {
		for _, opt := range chunkModes {
			synctest.Test(t, func(t *testing.T) {
				d := newContextDevice()
				d.extents = func(string, int64, int64) ([]wire.Extent, error) { return tt.extents, tt.err }
				s := newTestServer(t)
				s.serve(d)
				p := s.inChunks(opt)
				p.metaContexts(wire.OptSetMetaContext, "a", wire.BaseAllocation, "x-test:age")
				p.goTo("a")
				c := &chunked{p, opt == wire.OptExtendedHeaders}
				r := ranged(wire.CmdBlockStatus, 0, 0, 4096)
				if c.extended && tt.extended {
					if got := c.statuses(r, nil); len(got) != 2 {
						t.Errorf("%s: got %v", tt.name, got)
					}
				} else if got := c.fails(r, nil); got != tt.want {
					t.Errorf("%s, %v: got %v, want %v", tt.name, opt, got, tt.want)
				}
			})
		}
	}
}

// Names that cannot be sent are left out, and so are more than 16.
func TestOddContextNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newContextDevice()
		d.names = []string{"", "nocolon", "x:\xff", "x:\x00", "x:" + strings.Repeat("a", 4096), wire.BaseAllocation, "x:1", "x:1"}
		for i := range 20 {
			d.names = append(d.names, fmt.Sprintf("y:%d", i))
		}
		s := newTestServer(t)
		s.serve(d)
		p := s.inChunks(wire.OptStructuredReply)
		got := p.metaContexts(wire.OptListMetaContext, "a")
		if len(got) != 1+maxContexts || got[0].Name != wire.BaseAllocation || got[1].Name != "x:1" || got[2].Name != "y:0" {
			t.Errorf("got %v", got)
		}
	})
}

// contextExporter opens a contextDevice with those contexts that it is asked for.
type contextExporter struct {
	*fakeExporter
	calls   []string
	missing string // the context that is not available any more
	err     error
}

func (e *contextExporter) OpenFor(ctx context.Context, peer Peer, name string, queries []string) (Device, error) {
	e.calls = append(e.calls, fmt.Sprintf("open %s for %q", name, queries))
	d := newContextDevice()
	d.names = slices.DeleteFunc(slices.Clone(queries), func(q string) bool { return q == e.missing })
	e.open = func(context.Context, Peer, string) (Device, error) { return d, e.err }
	return e.fakeExporter.Open(ctx, peer, name)
}

func (e *contextExporter) Open(ctx context.Context, peer Peer, name string) (Device, error) {
	e.calls = append(e.calls, "open "+name)
	e.open = nil
	return e.fakeExporter.Open(ctx, peer, name)
}

func (e *contextExporter) ListContexts(_ context.Context, _ Peer, name string, queries []string) ([]string, error) {
	e.calls = append(e.calls, fmt.Sprintf("list %s for %q", name, queries))
	return []string{"x-test:", "nocolon"}, e.err
}

func newContextExporter(t *testing.T) (*testServer, *contextExporter) {
	s := newTestServer(t)
	e := &contextExporter{fakeExporter: s.exports}
	s.Exporter = e
	return s, e
}

// The exporter gets the queries before the export is opened, and for the options of real
// clients the export is opened once.
func TestExporterGetsQueries(t *testing.T) {
	const set, list, info, goes = wire.OptSetMetaContext, wire.OptListMetaContext, wire.OptInfo, wire.OptGo
	type step struct {
		opt     wire.Option
		name    string
		queries []string
	}
	dirty := []string{"x-test:dirty"}
	base := []string{wire.BaseAllocation}
	tests := []struct {
		name  string
		steps []step
		want  []string
	}{
		{"changed blocks", []step{{set, "a", dirty}, {goes, "a", nil}}, []string{`open a for ["x-test:dirty"]`}},
		{"with base:allocation", []step{{set, "a", append(base, dirty...)}, {info, "a", nil}, {goes, "a", nil}}, []string{`open a for ["x-test:dirty"]`}},
		{"base:allocation", []step{{set, "a", base}, {goes, "a", nil}}, []string{"open a"}},
		{"nothing selected", []step{{goes, "a", nil}}, []string{"open a"}},
		{"list", []step{{list, "a", nil}, {list, "a", dirty}, {goes, "a", nil}}, []string{`list a for []`, `list a for ["x-test:dirty"]`, "open a"}},
		{"info and list", []step{{info, "a", nil}, {list, "a", nil}, {goes, "a", nil}}, []string{"open a", `list a for []`}},
		{"info, then base:allocation", []step{{info, "a", nil}, {set, "a", base}, {goes, "a", nil}}, []string{"open a"}},
		{"info, then changed blocks", []step{{info, "a", nil}, {set, "a", dirty}, {goes, "a", nil}}, []string{"open a", `open a for ["x-test:dirty"]`}},
		{"less the second time", []step{{set, "a", dirty}, {set, "a", base}, {goes, "a", nil}}, []string{`open a for ["x-test:dirty"]`}},
		{"another one meanwhile", []step{{set, "a", dirty}, {info, "b", nil}, {goes, "a", nil}}, []string{`open a for ["x-test:dirty"]`, "open b", `open a for ["x-test:dirty"]`}},
		{"of another export", []step{{set, "b", dirty}, {goes, "a", nil}}, []string{`open b for ["x-test:dirty"]`, "open a"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, e := newContextExporter(t)
				p := s.inChunks(wire.OptStructuredReply)
				for _, step := range tt.steps {
					switch step.opt {
					case set, list:
						p.metaContexts(step.opt, step.name, step.queries...)
					default:
						p.info(step.opt, step.name)
					}
				}
				if !slices.Equal(e.calls, tt.want) {
					t.Errorf("got %q, want %q", e.calls, tt.want)
				}
			})
		})
	}
}

// TestExporterListsContexts: the list has the exporter's contexts and base:allocation.
func TestExporterListsContexts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, e := newContextExporter(t)
		p := s.inChunks(wire.OptStructuredReply)
		got := p.metaContexts(wire.OptListMetaContext, "a")
		if want := []wire.MetaContext{{Name: wire.BaseAllocation}, {Name: "x-test:"}}; !slices.Equal(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
		e.err = Refuse(ErrPolicy, "not for you", nil)
		data := wire.MetaContextRequest{Export: "a"}.Append(nil)
		if got := p.refused(wire.OptListMetaContext, data, wire.RepErrPolicy); got != "not for you" {
			t.Errorf("got the text %q", got)
		}
		if got := s.exports.opened(); len(got) != 0 {
			t.Errorf("exports were opened for a list: %q", got)
		}
	})
}

// TestSelectedContextIsGone: a context that is not available is not granted. If one that was
// granted is missing when the export is opened again, the export is refused.
func TestSelectedContextIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, e := newContextExporter(t)
		e.missing = "x-test:age"
		p := s.inChunks(wire.OptStructuredReply)
		got := p.metaContexts(wire.OptSetMetaContext, "a", "x-test:dirty", "x-test:age")
		if want := []wire.MetaContext{{ID: 2, Name: "x-test:dirty"}}; !slices.Equal(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
		p.info(wire.OptInfo, "b")
		e.missing = "x-test:dirty"
		text := p.refused(wire.OptGo, wire.InfoRequest{Name: "a"}.Append(nil), wire.RepErrInvalid)
		if !strings.Contains(text, "metadata context") {
			t.Errorf("got the text %q", text)
		}
	})
}

// FuzzMetaContexts sends bytes as the payload of both options for metadata contexts, for
// exports with contexts of their own, and opens the export with the selected contexts.
func FuzzMetaContexts(f *testing.F) {
	for _, queries := range [][]string{nil, {"x-test:dirty", wire.BaseAllocation}, {"x-test:", "", "x-test:dirty", "x-test:dirty"}} {
		f.Add(wire.MetaContextRequest{Export: "a", Queries: queries}.Append(nil))
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		synctest.Test(t, func(t *testing.T) {
			s, _ := newContextExporter(t)
			s.connect().feed(slices.Concat(
				wire.AppendClientFlags(nil, fixedNoZeroes), wire.AppendOption(nil, wire.OptStructuredReply, nil),
				wire.AppendOption(nil, wire.OptListMetaContext, payload), wire.AppendOption(nil, wire.OptSetMetaContext, payload),
				wire.AppendOption(nil, wire.OptGo, infoRequest("a")),
				wire.Request{Command: wire.CmdBlockStatus, Cookie: 1, Length: 4096}.Append(nil), wire.Request{Command: wire.CmdDisc}.Append(nil)))
		})
	})
}

// TestHolesAreNotRead: ranges that read as zeroes are not read from the device, also for clients
// with simple replies.
func TestHolesAreNotRead(t *testing.T) {
	const size, hole = 1 << 20, 256 << 10
	for _, opt := range []wire.Option{0, wire.OptStructuredReply} {
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer(t)
			d := newDevice(size)
			d.onRead = func(p []byte, off int64) (int, error) {
				if off < hole {
					t.Errorf("the hole was read: %d bytes at %d", len(p), off)
				}
				pattern(p, off)
				return len(p), nil
			}
			s.serve(&sparseDevice{d, func(off, n int64) ([]wire.Extent, error) {
				if off >= hole {
					return []wire.Extent{{Length: size - uint64(off)}}, nil
				}
				return []wire.Extent{{Length: hole - uint64(off), Status: 3}, {Length: size - hole}}, nil
			}})
			if opt != 0 {
				s.chunked(opt, "a").content(ranged(wire.CmdRead, 0, 0, 2*hole))
				return
			}
			p := s.negotiated("a")
			for range 2 { // the second time with a buffer that was used before
				p.send(readRequest(1, 0, 2*hole))
				if r := p.anyReply(); r.Errno != wire.Success {
					t.Fatalf("got %v", r.Errno)
				}
				want := make([]byte, 2*hole)
				pattern(want[hole:], hole)
				if got := p.receive(2 * hole); !slices.Equal(got, want) {
					t.Error("the client got other bytes than zeroes and the data behind them")
				}
				p.reads(hole, 2*hole)
			}
		})
	}
}
