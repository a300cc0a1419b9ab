package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"unicode"
	"unicode/utf8"
)

// json writes the report for programs.
func (r *checkReport) json(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(r)
}

// The columns of the report for people.
const (
	checkWidth   = 80
	levelColumns = 9 // "problem  "
)

// text writes the report for people: what was found, and below it, indented,
// what to do.
func (r *checkReport) text(w io.Writer) error {
	var b strings.Builder
	for _, f := range r.Findings {
		lines := wrap(f.What+" — "+f.Detail, checkWidth-levelColumns-2)
		fmt.Fprintf(&b, "%-*s%s\n", levelColumns, f.Level, lines[0])
		indent(&b, levelColumns+2, lines[1:])
		for line := range strings.Lines(f.Remedy) {
			indent(&b, levelColumns+4, wrap(line, checkWidth-levelColumns-4))
		}
	}
	fmt.Fprintf(&b, "\n%s, %s.\n", count(r.Problems, "problem"), count(r.Warnings, "warning"))
	_, err := io.WriteString(w, b.String())
	return err
}

func indent(b *strings.Builder, columns int, lines []string) {
	for _, line := range lines {
		b.WriteString(strings.Repeat(" ", columns) + line + "\n")
	}
}

// wrap breaks text at blanks into lines of at most width columns, at least one.
// What is longer than a line, such as a path, keeps together.
func wrap(text string, width int) []string {
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

// count is a number with its noun.
func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
