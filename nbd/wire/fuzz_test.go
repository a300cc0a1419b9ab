package wire_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"xapi-nbd/nbd/wire"
)

// The fuzz targets check one rule of the parsers: accepted input is written back unchanged,
// and the error for other input is the one that callers look for.

func seed(f *testing.F, parse func([]byte) (any, error)) {
	for _, m := range variableMessages {
		b := unhex(f, m.bytes)
		if _, err := parse(b); err == nil {
			f.Add(b)
			f.Add(b[:len(b)-1])
			f.Add(append(b, 0))
		}
	}
	f.Add([]byte{})
	f.Add(unhex(f, "ffffffff 0000"))
}

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

func FuzzParseBlockStatus(f *testing.F) {
	for _, m := range statusMessages {
		b := unhex(f, m.bytes)
		for _, ext := range []bool{false, true} {
			f.Add(b, ext)
			f.Add(b[:len(b)-1], ext)
			f.Add(append(b, 0), ext)
		}
	}
	f.Fuzz(func(t *testing.T, payload []byte, ext bool) {
		typ, write := wire.ChunkBlockStatus, wire.AppendBlockStatus
		if ext {
			typ, write = wire.ChunkBlockStatusExt, wire.AppendBlockStatusExt
		}
		id, extents, err := wire.ParseBlockStatus(typ, payload)
		if err != nil {
			if !errors.Is(err, wire.ErrMalformed) || id != 0 || extents != nil {
				t.Fatalf("got %d, %v and error %v, want nothing and ErrMalformed", id, extents, err)
			}
			return
		}
		if len(extents) == 0 {
			t.Error("got no extents and no error")
		}
		for _, e := range extents {
			if e.Length == 0 {
				t.Errorf("got an extent of 0 bytes in %v", extents)
			}
		}
		diffBytes(t, "written back", write(nil, id, extents), payload)
	})
}

func FuzzParseChunkFailure(f *testing.F) {
	for _, m := range payloadMessages {
		b := unhex(f, m.bytes)
		for _, typ := range []wire.ChunkType{wire.ChunkError, wire.ChunkErrorOffset, 1<<15 | 77} {
			f.Add(uint16(typ), b)
			f.Add(uint16(typ), b[:len(b)-1])
			f.Add(uint16(typ), append(b, 0))
		}
	}
	f.Fuzz(func(t *testing.T, typ uint16, payload []byte) {
		got, err := wire.ParseChunkFailure(wire.ChunkType(typ), payload)
		if err != nil {
			if !errors.Is(err, wire.ErrMalformed) || got != (wire.ChunkFailure{}) {
				t.Fatalf("got %+v and error %v, want nothing and ErrMalformed", got, err)
			}
			return
		}
		if got.Errno == wire.Success {
			t.Error("got an error that is success")
		}
		switch wire.ChunkType(typ) {
		case wire.ChunkError, wire.ChunkErrorOffset:
			diffBytes(t, "written back", got.Append(nil, wire.ChunkType(typ)), payload)
		default: // the bytes after the number depend on the type
			diffBytes(t, "number", binary.BigEndian.AppendUint32(nil, uint32(got.Errno)), payload[:4])
		}
	})
}

// FuzzParseHeaders takes the bytes for every message of fixed layout that they
// are long enough for.
func FuzzParseHeaders(f *testing.F) {
	for _, m := range fixedMessages {
		f.Add(append(unhex(f, m.bytes), make([]byte, 32)...))
	}
	f.Add(bytes.Repeat([]byte{0xff}, 32))
	f.Fuzz(func(t *testing.T, data []byte) {
		check := func(name string, n int, parse func(b []byte) ([]byte, error)) {
			if len(data) < n {
				return
			}
			b := data[:n]
			again, err := parse(b)
			var magic *wire.MagicError
			switch {
			case err == nil:
				diffBytes(t, name+" written back", again, b)
			case !errors.As(err, &magic):
				t.Errorf("%s: got error %v, want a MagicError", name, err)
			}
		}
		check("greeting", 18, func(b []byte) ([]byte, error) {
			flags, err := wire.ParseGreeting((*[18]byte)(b))
			return wire.AppendGreeting(nil, flags), err
		})
		check("client flags", 4, func(b []byte) ([]byte, error) {
			return wire.AppendClientFlags(nil, wire.ParseClientFlags((*[4]byte)(b))), nil
		})
		check("option header", 16, func(b []byte) ([]byte, error) {
			h, err := wire.ParseOptionHeader((*[16]byte)(b))
			// The length is only a claim: AppendOption writes the true one.
			return binary.BigEndian.AppendUint32(wire.AppendOption(nil, h.Option, nil)[:12], h.Length), err
		})
		check("option reply header", 20, func(b []byte) ([]byte, error) {
			h, err := wire.ParseOptionReplyHeader((*[20]byte)(b))
			return binary.BigEndian.AppendUint32(wire.AppendOptionReply(nil, h.Option, h.Type, nil)[:16], h.Length), err
		})
		check("answer to EXPORT_NAME", 10, func(b []byte) ([]byte, error) {
			size, flags := wire.ParseExportNameReply((*[10]byte)(b))
			return wire.AppendExportNameReply(nil, size, flags, false), nil
		})
		check("request", 28, func(b []byte) ([]byte, error) {
			r, err := wire.ParseRequest((*[28]byte)(b))
			return r.Append(nil), err
		})
		check("simple reply", 16, func(b []byte) ([]byte, error) {
			r, err := wire.ParseSimpleReply((*[16]byte)(b))
			return appendSimpleReply(nil, r.Errno, r.Cookie), err
		})
		check("structured reply chunk", 20, func(b []byte) ([]byte, error) {
			c, err := wire.ParseChunk((*[20]byte)(b))
			return appendChunk(nil, c), err
		})
		check("extended request", 32, func(b []byte) ([]byte, error) {
			r, err := wire.ParseExtendedRequest((*[32]byte)(b))
			return r.AppendExtended(nil), err
		})
		check("extended reply chunk", 32, func(b []byte) ([]byte, error) {
			c, err := wire.ParseExtendedChunk((*[32]byte)(b))
			return appendExtendedChunk(nil, c), err
		})
	})
}
