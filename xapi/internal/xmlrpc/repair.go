package xmlrpc

import (
	"bytes"
	"regexp"
	"unicode/utf8"
)

// repair rewrites what xapi is known to write wrongly:
//
//   - xapi does not escape member names, so a key of somebody's other_config that
//     holds & or < would spoil the reply that its record is in, and two such keys
//     could hide all that is between them, as a comment;
//   - a member name may hold control characters, which xapi drops from values only;
//   - storage managers may give xapi texts that are not valid UTF-8 or hold the two
//     characters that XML excludes.
//
// Names are escaped, and characters that XML cannot carry become U+FFFD. The
// rest of the reply stays as it is, so everything else that is wrong with it is
// still found. A key with the end of a name and a value in it ("</name><value>")
// cannot be told from the reply around it.
func repair(body []byte) []byte {
	rest := replaceInvalid(body)
	out := make([]byte, 0, len(rest))
	for {
		before, after, found := bytes.Cut(rest, openName)
		out = append(out, before...)
		if !found {
			return out
		}
		out = append(out, openName...)
		end := endOfName(after)
		if end < 0 {
			return append(out, after...)
		}
		out = appendEscaped(out, after[:end])
		rest = after[end:]
	}
}

var (
	openName  = []byte("<name>")
	closeName = []byte("</name>")
	openValue = []byte("<value")

	// reference is a character that is escaped already: a server that does escape
	// names has done so.
	reference = regexp.MustCompile(`^&(amp|lt|gt|quot|apos);`)
)

// endOfName returns the index of the </name> that ends the name at the beginning
// of b: the first one that is followed by a value. It is -1 if there is none.
func endOfName(b []byte) int {
	for from := 0; ; {
		i := bytes.Index(b[from:], closeName)
		if i < 0 {
			return -1
		}
		end := from + i
		from = end + len(closeName)
		if bytes.HasPrefix(bytes.TrimLeft(b[from:], " \t\r\n"), openValue) {
			return end
		}
	}
}

func appendEscaped(out, name []byte) []byte {
	for i, c := range name {
		switch {
		case c == '&' && !reference.Match(name[i:]):
			out = append(out, "&amp;"...)
		case c == '<':
			out = append(out, "&lt;"...)
		case c == '>':
			out = append(out, "&gt;"...)
		default:
			out = append(out, c)
		}
	}
	return out
}

// replaceInvalid replaces every byte and every character that XML cannot carry by
// U+FFFD.
func replaceInvalid(b []byte) []byte {
	out := make([]byte, 0, len(b))
	for len(b) > 0 {
		r, n := utf8.DecodeRune(b)
		if isXMLChar(r) {
			out = append(out, b[:n]...)
		} else {
			out = utf8.AppendRune(out, utf8.RuneError)
		}
		b = b[n:]
	}
	return out
}

// isXMLChar reports whether r is a Char of XML 1.0, section 2.2. U+FFFD, which
// stands for an invalid byte here too, is not counted as one.
func isXMLChar(r rune) bool {
	switch r {
	case '\t', '\n', '\r':
		return true
	case '\uFFFE', '\uFFFF', utf8.RuneError:
		return false
	}
	return r >= ' '
}
