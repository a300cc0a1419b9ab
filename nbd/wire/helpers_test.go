package wire_test

import (
	"encoding/hex"
	"strings"
	"testing"
)

// unhex parses bytes in hexadecimal: one group per field, with spaces between the fields. All
// expected bytes in these tests come from it, never from the code under test.
func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatalf("bad hex in the test, %q: %v", s, err)
	}
	return b
}

// ascii is unhex for text.
func ascii(s string) string { return hex.EncodeToString([]byte(s)) }

// diffBytes fails the test when got is not want.
func diffBytes(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if string(got) != string(want) {
		t.Errorf("%s: got %x, want %x", what, got, want)
	}
}
