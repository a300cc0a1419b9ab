package wire_test

import (
	"errors"
	"testing"

	"xapi-nbd/nbd/wire"
)

func FuzzParseInfoRequest(f *testing.F) {
	seed(f, parseInfoRequest)
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := wire.ParseInfoRequest(data)
		if err != nil {
			if !errors.Is(err, wire.ErrMalformed) || r.Name != "" || r.Infos != nil {
				t.Fatalf("got %+v and error %v, want nothing and ErrMalformed", r, err)
			}
			return
		}
		if len(r.Name) > wire.MaxString {
			t.Errorf("got a name of %d bytes", len(r.Name))
		}
		diffBytes(t, "written back", r.Append(nil), data)
	})
}

func FuzzParseInfo(f *testing.F) {
	seed(f, parseInfo)
	f.Fuzz(func(t *testing.T, data []byte) {
		before := wire.ExportInfo{Size: 1, Flags: 2, Name: "n", Description: "d"}
		e := before
		i, err := e.ParseInfo(data)
		if err != nil {
			if !errors.Is(err, wire.ErrMalformed) || e != before {
				t.Fatalf("got %+v and error %v, want no change and ErrMalformed", e, err)
			}
			return
		}
		if i > wire.InfoBlockSize {
			if e != before {
				t.Errorf("unknown information %v: got %+v, want no change", i, e)
			}
			data = data[:2] // its data is not kept
		}
		diffBytes(t, "written back", e.AppendInfo(nil, i), data)
	})
}

func FuzzParseServerReply(f *testing.F) {
	seed(f, parseServerReply)
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := wire.ParseServerReply(data)
		if err != nil {
			if !errors.Is(err, wire.ErrMalformed) || r != (wire.ServerReply{}) {
				t.Fatalf("got %+v and error %v, want nothing and ErrMalformed", r, err)
			}
			return
		}
		diffBytes(t, "written back", r.Append(nil), data)
	})
}

func FuzzParseMetaContextRequest(f *testing.F) {
	seed(f, parseMetaContextRequest)
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := wire.ParseMetaContextRequest(data)
		if err != nil {
			if !errors.Is(err, wire.ErrMalformed) || r.Export != "" || r.Queries != nil {
				t.Fatalf("got %+v and error %v, want nothing and ErrMalformed", r, err)
			}
			return
		}
		for _, s := range append(r.Queries, r.Export) {
			if len(s) > wire.MaxString {
				t.Errorf("got a string of %d bytes", len(s))
			}
		}
		diffBytes(t, "written back", r.Append(nil), data)
	})
}
