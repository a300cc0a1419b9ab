package text

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Indent adds lines, indented by a number of columns.
func Indent(b *strings.Builder, columns int, lines []string) {
	for _, line := range lines {
		b.WriteString(strings.Repeat(" ", columns) + line + "\n")
	}
}

// Wrap breaks text at blanks into lines of at most width columns, at least one.
// A word that is longer than a line, such as a path, is not broken. Control characters
// become blanks.
func Wrap(text string, width int) []string {
	text = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' ' // terminals obey them
		}
		return r
	}, text)
	lines := []string{""}
	for word := range strings.FieldsSeq(text) {
		last := &lines[len(lines)-1]
		switch {
		case *last == "":
			*last = word
		case utf8.RuneCountInString(*last)+1+utf8.RuneCountInString(word) <= width:
			*last += " " + word
		default:
			lines = append(lines, word)
		}
	}
	return lines
}

// Count returns a number with its noun, in the plural if needed: "1 line", "2 lines".
func Count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// OneLine returns text as one line without control characters, which a terminal would
// execute.
func OneLine(s string) string {
	return strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r <= ' ' || r >= 0x7f && r < 0xa0 }), " ")
}

// Cut shortens a line to a number of columns.
func Cut(line string, columns int) string {
	if utf8.RuneCountInString(line) <= columns {
		return line
	}
	return string([]rune(line)[:columns-1]) + "…"
}
