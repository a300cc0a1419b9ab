package wire

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// ProtocolString makes s a string of the protocol, section "Values": UTF-8 of at
// most [MaxString] bytes. Control characters, which a terminal might obey, become
// spaces.
func ProtocolString(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > MaxString {
		cut := MaxString
		for !utf8.RuneStart(s[cut]) {
			cut--
		}
		s = s[:cut]
	}
	return s
}
