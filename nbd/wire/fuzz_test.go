package wire_test

import (
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
