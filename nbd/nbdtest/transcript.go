package nbdtest

import (
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

// Transcript is a recorded dialogue of a server and a client. Its text has a message, or a
// part of one, per line:
//
//	S: "NBDMAGIC" "IHAVEOPT" 0003      # the server sends this
//	C: 00000001                        # the client sends this
//	S: eof                             # the server closes the connection
//
// Bytes are written in hex, in groups of any length, or as "text" without quotes and #
// inside. 00*124 is the byte 0 124 times. In bytes that are received, .. is any one byte
// (..*124 any 124), and the word text is a protocol string: its length in 32 bits and that
// many bytes of UTF-8 without NUL, at most 4096. cookie, or a word that begins with cookie,
// stands for 8 bytes that one side chooses and the other sends back. Everything after # is
// a comment.
type Transcript struct {
	name  string
	lines []line
}

// line is the bytes that one side sends at a time.
type line struct {
	no     int
	server bool // sent by the server
	eof    bool
	tokens []token
	source string // for messages
}

// token is a sequence of bytes, any bytes, a protocol string, or a cookie.
type token struct {
	bytes  []byte
	wild   int // any bytes, so many
	text   bool
	cookie string // its name
}

// LoadTranscript reads a transcript from a file.
func LoadTranscript(t testing.TB, path string) Transcript {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	tr, err := ParseTranscript(path, string(b))
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

// CheckPlayed fails the test if a folder has no transcripts, or one whose name without .txt
// is not in played.
func CheckPlayed(t testing.TB, dir string, played map[string]bool) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.txt"))
	if err != nil || len(files) == 0 {
		t.Errorf("no transcripts in %s: %v", dir, err)
	}
	for _, f := range files {
		if name := strings.TrimSuffix(filepath.Base(f), ".txt"); !played[name] {
			t.Errorf("%s is not played", f)
		}
	}
}

// ParseTranscript parses the text of a transcript. name is for error messages.
func ParseTranscript(name, text string) (Transcript, error) {
	tr := Transcript{name: name}
	for i, s := range strings.Split(text, "\n") {
		source, _, _ := strings.Cut(s, "#")
		source = strings.TrimSpace(source)
		if source == "" {
			continue
		}
		l, err := parseLine(source)
		if err != nil {
			return Transcript{}, fmt.Errorf("%s:%d: %w", name, i+1, err)
		}
		l.no, l.source = i+1, strings.TrimSpace(s)
		tr.lines = append(tr.lines, l)
	}
	if len(tr.lines) == 0 {
		return Transcript{}, fmt.Errorf("%s: no lines", name)
	}
	for _, l := range tr.lines[:len(tr.lines)-1] {
		if l.eof {
			return Transcript{}, fmt.Errorf("%s:%d: eof is not at the end", name, l.no)
		}
	}
	return tr, nil
}

func parseLine(s string) (line, error) {
	who, rest, ok := strings.Cut(s, ":")
	if !ok || (who != "S" && who != "C") {
		return line{}, fmt.Errorf("neither S: nor C: begins the line %q", s)
	}
	l := line{server: who == "S"}
	rest = strings.TrimSpace(rest)
	if rest == "eof" {
		l.eof = true
		return l, nil
	}
	for rest != "" {
		var tok token
		var err error
		if tok, rest, err = parseToken(rest); err != nil {
			return line{}, err
		}
		l.tokens = append(l.tokens, tok)
	}
	if l.tokens == nil {
		return line{}, fmt.Errorf("%q says nothing", s)
	}
	return l, nil
}

func parseToken(s string) (tok token, rest string, err error) {
	if quoted, ok := strings.CutPrefix(s, `"`); ok {
		text, rest, closed := strings.Cut(quoted, `"`)
		if !closed {
			return token{}, "", fmt.Errorf("quote not closed: %s", s)
		}
		return token{bytes: []byte(text)}, strings.TrimSpace(rest), nil
	}
	word, rest, _ := strings.Cut(s, " ")
	rest = strings.TrimSpace(rest)
	switch {
	case word == "text":
		return token{text: true}, rest, nil
	case strings.HasPrefix(word, "cookie"):
		return token{cookie: word}, rest, nil
	}
	tok, err = parseBytes(word)
	return tok, rest, err
}

// parseBytes parses hex, any bytes, or a repeated one of either.
func parseBytes(word string) (token, error) {
	if one, count, repeated := strings.Cut(word, "*"); repeated {
		n, err := strconv.ParseUint(count, 10, 24)
		if err != nil || len(one) != 2 {
			return token{}, fmt.Errorf("%q is not one byte and how often it comes", word)
		}
		word = strings.Repeat(one, int(n))
	}
	if word == strings.Repeat("..", len(word)/2) {
		return token{wild: len(word) / 2}, nil
	}
	b, err := hex.DecodeString(word)
	if err != nil {
		return token{}, fmt.Errorf("%.20q: %w", word, err)
	}
	return token{bytes: b}, nil
}

// cookies has the values of the cookies that have been received.
type cookies map[string][]byte

// sent returns the bytes of a line for the side that sends it.
func (l line) sent(seen cookies) ([]byte, error) {
	var b []byte
	for _, tok := range l.tokens {
		if tok.cookie != "" {
			tok.bytes = seen[tok.cookie]
		}
		if tok.bytes == nil {
			return nil, fmt.Errorf("%q cannot be sent: it does not say which bytes", l.source)
		}
		b = append(b, tok.bytes...)
	}
	return b, nil
}

// checkText returns an error if b is no protocol string.
func checkText(b []byte) error {
	switch {
	case !utf8.Valid(b):
		return fmt.Errorf("text is not UTF-8: %q", b)
	case strings.ContainsRune(string(b), 0):
		return fmt.Errorf("text contains NUL: %q", b)
	}
	return nil
}
