package wire_test

import (
	"strings"
	"testing"
	"unicode/utf8"

	"xapi-nbd/nbd/wire"
)

func TestProtocolString(t *testing.T) {
	for _, s := range []string{strings.Repeat("x", 5000), strings.Repeat("ä", 3000), "x" + strings.Repeat("\U0001f4be", 2000)} {
		got := wire.ProtocolString(s)
		if len(got) > wire.MaxString || len(got) < wire.MaxString-3 || !utf8.ValidString(got) || !strings.HasPrefix(s, got) {
			t.Errorf("%.10q...: cut to %d bytes, valid: %v", s, len(got), utf8.ValidString(got))
		}
	}
}
