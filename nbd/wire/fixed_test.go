package wire_test

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"xapi-nbd/nbd/wire"
)

func TestFixedGolden(t *testing.T) {
	for _, m := range fixedMessages {
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

// TestFixedMagic flips every bit of every magic number.
func TestFixedMagic(t *testing.T) {
	for _, m := range fixedMessages {
		t.Run(m.name, func(t *testing.T) {
			for i := 0; i < len(m.magic); i += 2 {
				for bit := range 8 * m.magic[i+1] {
					b := unhex(t, m.bytes)
					b[m.magic[i]+bit/8] ^= 1 << (bit % 8)
					got, err := m.parse(b)
					var magic *wire.MagicError
					if !errors.As(err, &magic) {
						t.Fatalf("%x: got %v and error %v, want a MagicError", b, got, err)
					}
					if magic.Got == magic.Want || magic.Where == "" || magic.Error() == "" {
						t.Errorf("%x: got %+v, which does not describe the fault", b, magic)
					}
				}
			}
		})
	}
}

func TestMagicErrorText(t *testing.T) {
	err := &wire.MagicError{Where: "request", Got: 0x12, Want: uint64(wire.MagicRequest)}
	if got, want := err.Error(), "bad magic in request: got 0x12, want 0x25609513"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestOldstyleGreeting: an oldstyle server's second magic number is not ours.
func TestOldstyleGreeting(t *testing.T) {
	b := unhex(t, ascii("NBDMAGIC")+"00420281861253 00"+"0000")
	_, err := wire.ParseGreeting((*[18]byte)(b[:18]))
	var magic *wire.MagicError
	if !errors.As(err, &magic) {
		t.Errorf("got error %v, want a MagicError", err)
	}
}

func TestExportNameReplyZeroes(t *testing.T) {
	got := wire.AppendExportNameReply(nil, 512, wire.FlagHasFlags, true)
	if len(got) != 134 {
		t.Fatalf("got %d bytes, want 8 + 2 + 124 = 134", len(got))
	}
	diffBytes(t, "answer", got, append(unhex(t, "0000000000000200 0001"), make([]byte, 124)...))
	if wire.ExportNameReplyLen+wire.ExportNameZeroes != 134 {
		t.Errorf("the constants add up to %d, want 134", wire.ExportNameReplyLen+wire.ExportNameZeroes)
	}
}

func TestIsError(t *testing.T) {
	for typ, want := range map[wire.OptionReply]bool{
		wire.RepAck: false, wire.RepServer: false, wire.RepInfo: false, wire.RepMetaContext: false,
		wire.RepErrUnsup: true, wire.RepErrTooBig: true, 1<<31 | 12345: true, 12345: false, 1 << 31: true,
	} {
		if got := typ.IsError(); got != want {
			t.Errorf("%v: got %v, want %v", typ, got, want)
		}
	}
}
