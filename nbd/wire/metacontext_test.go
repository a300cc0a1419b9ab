package wire_test

import (
	"errors"
	"runtime"
	"strings"
	"testing"

	"xapi-nbd/nbd/wire"
)

func parseMetaContextRequest(b []byte) (any, error) { return wire.ParseMetaContextRequest(b) }
func parseMetaContext(b []byte) (any, error)        { return wire.ParseMetaContext(b) }
func parseStatusFilter(b []byte) (any, error)       { return wire.ParseStatusFilter(b) }

func metaContextRequest(export string, queries ...string) wire.MetaContextRequest {
	return wire.MetaContextRequest{Export: export, Queries: queries}
}

var metaContextMessages = []variableMessage{{
	name: "context request", bytes: "00000004" + ascii("disk") + "00000001 0000000f" + ascii("base:allocation"),
	append: metaContextRequest("disk", "base:allocation").Append, parse: parseMetaContextRequest,
	want: metaContextRequest("disk", "base:allocation"),
}, {
	name: "context request, nothing asked", bytes: "00000000 00000000",
	append: metaContextRequest("").Append, parse: parseMetaContextRequest, want: metaContextRequest(""),
}, {
	name: "context request with an empty query", bytes: "00000001" + ascii("x") + "00000002 00000000 00000005" + ascii("base:"),
	append: metaContextRequest("x", "", "base:").Append, parse: parseMetaContextRequest, want: metaContextRequest("x", "", "base:"),
}, {
	name: "context", bytes: "00000007" + ascii("base:allocation"),
	append: wire.MetaContext{ID: 7, Name: "base:allocation"}.Append, parse: parseMetaContext,
	want:    wire.MetaContext{ID: 7, Name: "base:allocation"},
	openEnd: true, shortest: 4,
}, {
	name: "context without a name", bytes: "ffffffff",
	append: wire.MetaContext{ID: 1<<32 - 1}.Append, parse: parseMetaContext, want: wire.MetaContext{ID: 1<<32 - 1},
	openEnd: true, shortest: 4,
}, {
	name: "status filter", bytes: "0000010000000000 00000001 fffffffe",
	append: wire.StatusFilter{Length: 1 << 40, IDs: []uint32{1, 1<<32 - 2}}.Append, parse: parseStatusFilter,
	want: wire.StatusFilter{Length: 1 << 40, IDs: []uint32{1, 1<<32 - 2}},
	step: 4, shortest: 8,
}}

// parsedStatus is a parsed status chunk.
type parsedStatus struct {
	ID      uint32
	Extents []wire.Extent
}

func parseStatus(t wire.ChunkType) func([]byte) (any, error) {
	return func(b []byte) (any, error) {
		id, extents, err := wire.ParseBlockStatus(t, b)
		return parsedStatus{id, extents}, err
	}
}

func appendStatus(s parsedStatus) func([]byte) []byte {
	return func(b []byte) []byte { return wire.AppendBlockStatus(b, s.ID, s.Extents) }
}

func appendStatusExt(s parsedStatus) func([]byte) []byte {
	return func(b []byte) []byte { return wire.AppendBlockStatusExt(b, s.ID, s.Extents) }
}

var (
	someStatus    = parsedStatus{1, []wire.Extent{{Length: 65536}, {Length: 512, Status: wire.StateHole | wire.StateZero}, {Length: 1, Status: wire.StateZero}}}
	largestStatus = parsedStatus{1<<32 - 1, []wire.Extent{{Length: 1<<32 - 1, Status: 1<<32 - 1}}}
	largeStatus   = parsedStatus{2, []wire.Extent{{Length: 1 << 40, Status: 1 << 32}, {Length: 1<<64 - 1, Status: 1<<64 - 1}}}
)

var statusMessages = []variableMessage{{
	name: "status", bytes: "00000001 00010000 00000000 00000200 00000003 00000001 00000002",
	append: appendStatus(someStatus), parse: parseStatus(wire.ChunkBlockStatus), want: someStatus,
	step: 8, shortest: 12,
}, {
	name: "status, every bit set", bytes: "ffffffff ffffffff ffffffff",
	append: appendStatus(largestStatus), parse: parseStatus(wire.ChunkBlockStatus), want: largestStatus,
}, {
	name: "extended status", bytes: "00000001 00000003 0000000000010000 0000000000000000 0000000000000200 0000000000000003 0000000000000001 0000000000000002",
	append: appendStatusExt(someStatus), parse: parseStatus(wire.ChunkBlockStatusExt), want: someStatus,
}, {
	name: "extended status above 32 bits", bytes: "00000002 00000002 0000010000000000 0000000100000000 ffffffffffffffff ffffffffffffffff",
	append: appendStatusExt(largeStatus), parse: parseStatus(wire.ChunkBlockStatusExt), want: largeStatus,
}}

// TestMetaContextsRefused parses lengths and counts that do not match the data, and extents
// with which a client would make no progress.
func TestMetaContextsRefused(t *testing.T) {
	long := strings.Repeat("n", wire.MaxString)
	status, statusExt := parseStatus(wire.ChunkBlockStatus), parseStatus(wire.ChunkBlockStatusExt)
	tests := []struct {
		name  string
		bytes string
		parse func([]byte) (any, error)
		ok    bool
	}{
		{"export of 4 GiB", "ffffffff" + ascii("disk") + "00000000", parseMetaContextRequest, false},
		{"longest export", "00001000" + ascii(long) + "00000000", parseMetaContextRequest, true},
		{"export above the longest", "00001001" + ascii(long+"n") + "00000000", parseMetaContextRequest, false},
		{"longest query", "00000000 00000001 00001000" + ascii(long), parseMetaContextRequest, true},
		{"query above the longest", "00000000 00000001 00001001" + ascii(long+"n"), parseMetaContextRequest, false},
		{"query of 2 GiB", "00000000 00000001 80000000" + ascii("disk"), parseMetaContextRequest, false},
		{"one query too few", "00000000 00000002 00000004" + ascii("disk"), parseMetaContextRequest, false},
		{"one query too many", "00000000 00000001 00000000 00000000", parseMetaContextRequest, false},
		{"four billion queries in nothing", "00000000 ffffffff", parseMetaContextRequest, false},
		{"a billion queries, whose bytes are 0 in 32 bits", "00000000 40000000", parseMetaContextRequest, false},
		{"longest context", "00000001" + ascii(long), parseMetaContext, true},
		{"context above the longest", "00000001" + ascii(long+"n"), parseMetaContext, false},
		{"no extents", "00000001", status, false},
		{"half an extent", "00000001 00000200", status, false},
		{"empty extent", "00000001 00000000 00000000", status, false},
		{"empty extent at the end", "00000001 00000200 00000000 00000000 00000003", status, false},
		{"no extended extents", "00000001 00000000", statusExt, false},
		{"one extended extent too few", "00000001 00000002 0000000000000200 0000000000000000", statusExt, false},
		{"one extended extent too many", "00000001 00000000 0000000000000200 0000000000000000", statusExt, false},
		{"four billion extended extents", "00000001 ffffffff 0000000000000200 0000000000000000", statusExt, false},
		{"extended extents, whose bytes fit 32 bits", "00000001 10000001 0000000000000200 0000000000000000", statusExt, false},
		{"empty extended extent", "00000001 00000001 0000000000000000 0000000000000000", statusExt, false},
		{"extents of the other kind", "00000001 00000200 00000000", statusExt, false},
		{"half an id", "0000000000000200 0000", parseStatusFilter, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := tt.parse(unhex(t, tt.bytes))
			if tt.ok != (err == nil) || !tt.ok && !errors.Is(err, wire.ErrMalformed) {
				t.Fatalf("got %v and error %v, want ok %v or ErrMalformed", got, err, tt.ok)
			}
			if err != nil && strings.Contains(err.Error(), "disk") {
				t.Errorf("the error %q repeats the name, which may be a secret", err)
			}
		})
	}
}

// TestCountsAreNotAllocated checks that a count in a message does not determine how much
// memory is allocated, only the length of its data.
func TestCountsAreNotAllocated(t *testing.T) {
	const rounds, limit = 100, 4096 // bytes per call, for an error and its text
	for name, tt := range map[string]struct {
		bytes string
		parse func([]byte) (any, error)
	}{
		"queries":  {"00000000 ffffffff 00000000 00000000", parseMetaContextRequest},
		"extents":  {"00000001 ffffffff 0000000000000200 0000000000000000", parseStatus(wire.ChunkBlockStatusExt)},
		"a string": {"ffffffff" + ascii("disk"), parseMetaContextRequest},
		"a text":   {"00000005 ffff" + ascii("text"), parseFailure(wire.ChunkError)},
	} {
		b := unhex(t, tt.bytes)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for range rounds {
			if got, err := tt.parse(b); !errors.Is(err, wire.ErrMalformed) {
				t.Fatalf("%s: got %v and error %v, want ErrMalformed", name, got, err)
			}
		}
		runtime.ReadMemStats(&after)
		if got := (after.TotalAlloc - before.TotalAlloc) / rounds; got > limit {
			t.Errorf("%s: got %d bytes allocated per call, want at most %d", name, got, limit)
		}
	}
}
