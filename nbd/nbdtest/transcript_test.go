package nbdtest_test

import (
	"errors"
	"io"
	"net"
	"strings"
	"testing"

	"xapi-nbd/nbd/nbdtest"
)

func parse(t *testing.T, text string) nbdtest.Transcript {
	t.Helper()
	tr, err := nbdtest.ParseTranscript("test", text)
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

func TestParseTranscriptErrors(t *testing.T) {
	tests := []struct{ name, text, want string }{
		{"empty", "# nothing\n\n", "no lines"},
		{"no side", "S: 00\n00", "test:2: neither S: nor C:"},
		{"wrong side", "X: 00", "neither S: nor C:"},
		{"odd digits", "S: 000", "odd length"},
		{"no digits", "S: zz", "invalid byte"},
		{"odd dots", "S: ...", "invalid byte"},
		{"open quote", `S: "abc`, "quote not closed"},
		{"nothing said", "S:", "says nothing"},
		{"end in the middle", "S: eof\nC: 00", "not at the end"},
		{"repeated too often", "S: 00*999999999", "how often"},
		{"two bytes repeated", "S: 0001*2", "how often"},
		{"repeated without a count", "S: 00*", "how often"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := nbdtest.ParseTranscript("test", tt.text); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got error %v, want %q", err, tt.want)
			}
		})
	}
}

// TestPlay plays a transcript against a peer that reads and writes the bytes of the test.
func TestPlay(t *testing.T) {
	const text = `
		S: "hi" 00*3 ..*2 .... 00000003 # a comment
		C: 0102 "ab"
		S: 09 text   # a protocol string
		S: eof`
	good := "hi\x00\x00\x00wild\x00\x00\x00\x03"
	tests := []struct{ name, first, second, want string }{
		{"as written", good, "\x09\x00\x00\x00\x05hello", ""},
		{"other text", good, "\x09\x00\x00\x00\x00", ""},
		{"wrong byte", "ho" + good[2:], "", "test:2: "},
		{"wrong last byte", good[:12] + "\x04", "", "at byte 3"},
		{"cut short", good[:4], "", "unexpected EOF"},
		{"nothing", "", "", "and then EOF"},
		{"more than there was", good, "\x09\x00\x00\x00\x00!", "want the end of the connection"},
		{"text too long", good, "\x09\x00\x00\x10\x01", "at most 4096"},
		{"text not UTF-8", good, "\x09\x00\x00\x00\x01\xff", "not UTF-8"},
		{"text with NUL", good, "\x09\x00\x00\x00\x01\x00", "contains NUL"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			near, far := net.Pipe()
			got := make([]byte, 4)
			done := make(chan error, 1)
			go func() {
				defer far.Close()
				_, err := io.WriteString(far, tt.first)
				if err == nil && tt.second != "" {
					if _, err = io.ReadFull(far, got); err == nil {
						_, err = io.WriteString(far, tt.second)
					}
				}
				done <- err
			}()
			failed := failuresOf(t, func(tb testing.TB) { nbdtest.Play(tb, near, parse(t, text)) })
			near.Close()
			err := <-done
			if tt.want == "" && (failed != "" || err != nil || string(got) != "\x01\x02ab") {
				t.Errorf("got failures %q, error %v and bytes %x, want none, none and 01026162", failed, err, got)
			}
			if tt.want != "" && !strings.Contains(failed, tt.want) {
				t.Errorf("got failures %q, want one with %q", failed, tt.want)
			}
		})
	}
}

// TestPlayBothSides lets the two players play against each other, with a
// cookie that goes there and back.
func TestPlayBothSides(t *testing.T) {
	client := parse(t, "S: 01\nC: 02 0000000000000042\nS: 03 0000000000000042\nC: 04*70000\nC: eof")
	server := parse(t, "S: 01\nC: 02 cookie\nS: 03 cookie\nC: ..*70000\nC: eof")
	near, far := net.Pipe()
	wait := nbdtest.PlayServer(t, far, server)
	nbdtest.Play(t, near, client)
	wait()
	if _, err := near.Write([]byte{0}); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("write after C: eof: got error %v, want io.ErrClosedPipe", err)
	}
}

func TestPlayCannotSendWild(t *testing.T) {
	for _, text := range []string{"C: 00 ..", "C: text", "C: cookie"} {
		near, far := net.Pipe()
		got := failuresOf(t, func(tb testing.TB) { nbdtest.Play(tb, near, parse(t, text)) })
		if !strings.Contains(got, "does not say which bytes") {
			t.Errorf("%s: got failures %q", text, got)
		}
		near.Close()
		far.Close()
	}
}
