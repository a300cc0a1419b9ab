package wire_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"xapi-nbd/nbd/wire"
)

// variableMessage is one message whose length is not fixed.
type variableMessage struct {
	name   string
	bytes  string
	append func(prefix []byte) []byte
	parse  func(b []byte) (any, error)
	want   any

	// A text at the end has no length of its own: cutting it leaves a valid
	// message down to shortest, and bytes behind it belong to it. So do lists,
	// but only in whole items of step bytes.
	openEnd  bool
	step     int
	shortest int
}

// validCut reports whether the first n bytes are a message too.
func (m variableMessage) validCut(n int) bool {
	return n >= m.shortest && (m.openEnd || m.step > 0 && (n-m.shortest)%m.step == 0)
}

func parseInfoRequest(b []byte) (any, error) { return wire.ParseInfoRequest(b) }
func parseServerReply(b []byte) (any, error) { return wire.ParseServerReply(b) }

// parsedInfo is a parsed information reply.
type parsedInfo struct {
	Kind wire.Info
	Info wire.ExportInfo
}

func parseInfo(b []byte) (any, error) {
	var e wire.ExportInfo
	i, err := e.ParseInfo(b)
	return parsedInfo{i, e}, err
}

func appendInfo(i wire.Info, e wire.ExportInfo) func([]byte) []byte {
	return func(b []byte) []byte { return e.AppendInfo(b, i) }
}

func infoRequest(name string, infos ...wire.Info) wire.InfoRequest {
	return wire.InfoRequest{Name: name, Infos: infos}
}

var variableMessages = slices.Concat(optionMessages, metaContextMessages, statusMessages, payloadMessages)

var optionMessages = []variableMessage{{
	name: "info request", bytes: "00000004" + ascii("disk") + "0002 0003 0001",
	append: infoRequest("disk", wire.InfoBlockSize, wire.InfoName).Append,
	parse:  parseInfoRequest,
	want:   infoRequest("disk", wire.InfoBlockSize, wire.InfoName),
}, {
	name: "info request, default export, nothing asked", bytes: "00000000 0000",
	append: infoRequest("").Append, parse: parseInfoRequest, want: infoRequest(""),
}, {
	name: "info request, unknown kind twice", bytes: "00000001" + ascii("x") + "0002 1234 1234",
	append: infoRequest("x", 0x1234, 0x1234).Append, parse: parseInfoRequest, want: infoRequest("x", 0x1234, 0x1234),
}, {
	name: "server reply", bytes: "00000004" + ascii("disk"),
	append: wire.ServerReply{Name: "disk"}.Append, parse: parseServerReply, want: wire.ServerReply{Name: "disk"},
	openEnd: true, shortest: 8,
}, {
	name: "server reply with a text", bytes: "00000004" + ascii("disk") + ascii("a disk"),
	append: wire.ServerReply{Name: "disk", Details: "a disk"}.Append, parse: parseServerReply,
	want:    wire.ServerReply{Name: "disk", Details: "a disk"},
	openEnd: true, shortest: 8,
}, {
	name: "server reply of the default export", bytes: "00000000",
	append: wire.ServerReply{}.Append, parse: parseServerReply, want: wire.ServerReply{},
	openEnd: true, shortest: 4,
}, {
	name: "INFO_EXPORT", bytes: "0000 0000000000010000 0103",
	append: appendInfo(wire.InfoExport, wire.ExportInfo{Size: 65536, Flags: 0x103, Name: "not this"}),
	parse:  parseInfo, want: parsedInfo{wire.InfoExport, wire.ExportInfo{Size: 65536, Flags: 0x103}},
}, {
	name: "INFO_NAME", bytes: "0001" + ascii("disk"),
	append: appendInfo(wire.InfoName, wire.ExportInfo{Name: "disk", Description: "not this"}),
	parse:  parseInfo, want: parsedInfo{wire.InfoName, wire.ExportInfo{Name: "disk"}},
	openEnd: true, shortest: 2,
}, {
	name: "INFO_DESCRIPTION", bytes: "0002" + ascii("a disk"),
	append: appendInfo(wire.InfoDescription, wire.ExportInfo{Name: "not this", Description: "a disk"}),
	parse:  parseInfo, want: parsedInfo{wire.InfoDescription, wire.ExportInfo{Description: "a disk"}},
	openEnd: true, shortest: 2,
}, {
	name: "INFO_BLOCK_SIZE", bytes: "0003 00000200 00001000 02000000",
	append: appendInfo(wire.InfoBlockSize, wire.ExportInfo{BlockSizes: wire.BlockSizes{Min: 512, Preferred: 4096, MaxPayload: 32 << 20}}),
	parse:  parseInfo,
	want:   parsedInfo{wire.InfoBlockSize, wire.ExportInfo{BlockSizes: wire.BlockSizes{Min: 512, Preferred: 4096, MaxPayload: 32 << 20}}},
}, {
	name: "unknown information", bytes: "0123",
	append: appendInfo(0x123, wire.ExportInfo{Size: 1}), parse: parseInfo, want: parsedInfo{Kind: 0x123},
	openEnd: true, shortest: 2,
}}

func TestVariableGolden(t *testing.T) {
	for _, m := range variableMessages {
		t.Run(m.name, func(t *testing.T) {
			want := unhex(t, m.bytes)
			diffBytes(t, "append", m.append(nil), want)
			diffBytes(t, "append behind something", m.append([]byte("x")), append([]byte("x"), want...))
			got, err := m.parse(want)
			if err != nil {
				t.Fatalf("parse: got error %v, want none", err)
			}
			if diff := cmp.Diff(m.want, got); diff != "" {
				t.Errorf("parse (-want +got):\n%s", diff)
			}
		})
	}
}

func TestVariableTruncated(t *testing.T) {
	for _, m := range variableMessages {
		t.Run(m.name, func(t *testing.T) {
			whole := unhex(t, m.bytes)
			for n := range whole {
				got, err := m.parse(whole[:n:n])
				if m.validCut(n) {
					if err != nil {
						t.Errorf("first %d bytes: got error %v, want a shorter message", n, err)
					}
					continue
				}
				if !errors.Is(err, wire.ErrMalformed) {
					t.Errorf("first %d of %d bytes: got %v and error %v, want ErrMalformed", n, len(whole), got, err)
				}
			}
		})
	}
}

func TestVariableExtraByte(t *testing.T) {
	for _, m := range variableMessages {
		t.Run(m.name, func(t *testing.T) {
			got, err := m.parse(append(unhex(t, m.bytes), '!'))
			switch {
			case m.openEnd && err != nil:
				t.Errorf("got error %v, want a longer text", err)
			case !m.openEnd && !errors.Is(err, wire.ErrMalformed):
				t.Errorf("got %v and error %v, want ErrMalformed", got, err)
			}
		})
	}
}

// TestWrongLengthsAreRefused parses lengths that do not match the data.
func TestWrongLengthsAreRefused(t *testing.T) {
	long := strings.Repeat("n", wire.MaxString)
	tests := []struct {
		name  string
		bytes string
		parse func([]byte) (any, error)
		ok    bool
	}{
		{"info request: name as long as everything", "00000006" + ascii("disk") + "0000", parseInfoRequest, false},
		{"info request: name one longer", "00000005" + ascii("disk") + "0000", parseInfoRequest, false},
		{"info request: name one shorter", "00000003" + ascii("disk") + "0000", parseInfoRequest, false},
		{"info request: name of 4 GiB", "ffffffff" + ascii("disk") + "0000", parseInfoRequest, false},
		{"info request: name of 2 GiB", "80000000" + ascii("disk") + "0000", parseInfoRequest, false},
		{"info request: one request too few", "00000000 0002 0003", parseInfoRequest, false},
		{"info request: one request too many", "00000000 0001 0003 0003", parseInfoRequest, false},
		{"info request: 65535 requests in nothing", "00000000 ffff", parseInfoRequest, false},
		{"info request: half a request", "00000000 0001 00", parseInfoRequest, false},
		{"info request: longest name", "00001000" + ascii(long) + "0000", parseInfoRequest, true},
		{"info request: name above the longest", "00001001" + ascii(long+"n") + "0000", parseInfoRequest, false},
		{"server reply: name one longer", "00000005" + ascii("disk"), parseServerReply, false},
		{"server reply: name of 4 GiB", "ffffffff" + ascii("disk"), parseServerReply, false},
		{"server reply: name of 2 GiB", "80000000" + ascii("disk"), parseServerReply, false},
		{"server reply: longest name", "00001000" + ascii(long), parseServerReply, true},
		{"server reply: name above the longest", "00001001" + ascii(long+"n"), parseServerReply, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := tt.parse(unhex(t, tt.bytes))
			if tt.ok {
				if err != nil {
					t.Errorf("got error %v, want none", err)
				}
				return
			}
			if !errors.Is(err, wire.ErrMalformed) {
				t.Fatalf("got %v and error %v, want ErrMalformed", got, err)
			}
			if strings.Contains(err.Error(), "disk") {
				t.Errorf("the error %q repeats the name, which may be a secret", err)
			}
		})
	}
}

// TestMalformedInfoChangesNothing checks that a malformed reply and one of an unknown kind do
// not change the information about an export.
func TestMalformedInfoChangesNothing(t *testing.T) {
	known := wire.ExportInfo{Size: 42, Flags: 1, Name: "n", Description: "d", BlockSizes: wire.BlockSizes{Min: 1, Preferred: 4096, MaxPayload: 1 << 20}}
	for _, s := range []string{"", "00", "0000", "0000 00000000000100", "0000 0000000000010000 0103 00", "0003 00000200 00001000", "0003 00000200 00001000 02000000 00", "0123 ffff"} {
		e := known
		_, err := e.ParseInfo(unhex(t, s))
		if isUnknown := strings.HasPrefix(s, "0123"); (err == nil) != isUnknown {
			t.Errorf("%q: got error %v", s, err)
		}
		if diff := cmp.Diff(known, e); diff != "" {
			t.Errorf("%q changed the result (-before +after):\n%s", s, diff)
		}
	}
}

func TestWants(t *testing.T) {
	r := infoRequest("x", wire.InfoBlockSize, 77)
	for i, want := range map[wire.Info]bool{wire.InfoBlockSize: true, 77: true, wire.InfoName: false, wire.InfoExport: false} {
		if got := r.Wants(i); got != want {
			t.Errorf("%v: got %v, want %v", i, got, want)
		}
	}
}

// TestWithData: header and data of options and their replies belong together.
func TestWithData(t *testing.T) {
	option := unhex(t, ascii("IHAVEOPT")+"00000001 00000004"+ascii("disk"))
	diffBytes(t, "option", wire.AppendOption(nil, wire.OptExportName, []byte("disk")), option)
	hdr, err := wire.ParseOptionHeader((*[16]byte)(option))
	if want := (wire.OptionHeader{Option: wire.OptExportName, Length: 4}); hdr != want || err != nil {
		t.Errorf("option header: got %+v and error %v, want %+v", hdr, err, want)
	}

	reply := unhex(t, "0003e889045565a9 00000003 80000002 00000002"+ascii("no"))
	diffBytes(t, "option reply", wire.AppendOptionReply(nil, wire.OptList, wire.RepErrPolicy, []byte("no")), reply)
	rhdr, err := wire.ParseOptionReplyHeader((*[20]byte)(reply))
	if want := (wire.OptionReplyHeader{Option: wire.OptList, Type: wire.RepErrPolicy, Length: 2}); rhdr != want || err != nil {
		t.Errorf("option reply header: got %+v and error %v, want %+v", rhdr, err, want)
	}
}

// TestLengthIsNotChecked: headers are parsed with any announced length.
func TestLengthIsNotChecked(t *testing.T) {
	hdr, err := wire.ParseOptionHeader((*[16]byte)(unhex(t, ascii("IHAVEOPT")+"00000007 ffffffff")))
	if err != nil || hdr.Length != 1<<32-1 {
		t.Errorf("option: got length %d and error %v, want 2^32-1", hdr.Length, err)
	}
	rhdr, err := wire.ParseOptionReplyHeader((*[20]byte)(unhex(t, "0003e889045565a9 00000007 00000003 ffffffff")))
	if err != nil || rhdr.Length != 1<<32-1 {
		t.Errorf("option reply: got length %d and error %v, want 2^32-1", rhdr.Length, err)
	}
}
