package xmlrpc

import (
	"bytes"
	"regexp"
	"unicode/utf8"
)

// repair corrects known faults of xapi's replies:
//
//   - xapi does not escape member names, so a key of an other_config that contains
//     & or < would make the reply unreadable, and two such keys could turn the text
//     between them into a comment;
//   - a member name may hold control characters, which xapi drops from values only;
//   - storage managers may give xapi texts that are not valid UTF-8 or hold the two
//     characters that XML excludes.
//
// Names are escaped, and characters that XML does not allow become U+FFFD. The rest of the
// reply is unchanged, so other faults are still found. A key that contains the end of a name
// and a value ("</name><value>") cannot be distinguished from the reply around it.
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

// replaceInvalid replaces every byte and every character that XML does not allow by U+FFFD.
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

// isXMLChar reports whether r is a Char of XML 1.0, section 2.2. The result for U+FFFD, which
// also replaces invalid bytes, is false.
func isXMLChar(r rune) bool {
	switch r {
	case '\t', '\n', '\r':
		return true
	case '\uFFFE', '\uFFFF', utf8.RuneError:
		return false
	}
	return r >= ' '
}
