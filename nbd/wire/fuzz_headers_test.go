package wire_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"xapi-nbd/nbd/wire"
)

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
