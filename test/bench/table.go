package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"
)

// table is one of the report.
type table struct {
	title, note string
	head        []string
	left        []int // columns of words; all others are numbers, to the right
	rows        [][]string
}

// writeText writes the table for a terminal.
func (t table) writeText(w io.Writer) error {
	widths := make([]int, len(t.head))
	for _, row := range append([][]string{t.head}, t.rows...) {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	var text strings.Builder
	fmt.Fprintf(&text, "\n%s\n%s", t.title, wrapped(t.note, 100))
	for _, row := range append([][]string{t.head}, t.rows...) {
		var line strings.Builder
		for i, cell := range row {
			pad := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell))
			if slices.Contains(t.left, i) {
				cell += pad
			} else {
				cell = pad + cell
			}
			line.WriteString(cell + "  ")
		}
		text.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
	_, err := io.WriteString(w, text.String())
	return err
}

// markdown is the table as GitHub's dialect has it.
func (t table) markdown() string {
	var text strings.Builder
	fmt.Fprintf(&text, "### %s\n\n", t.title)
	if t.note != "" {
		text.WriteString(wrapped(t.note, 100) + "\n")
	}
	rule := make([]string, len(t.head))
	for i := range t.head {
		if rule[i] = "---:"; slices.Contains(t.left, i) {
			rule[i] = "---"
		}
	}
	for _, row := range append([][]string{t.head, rule}, t.rows...) {
		text.WriteString("| " + strings.Join(row, " | ") + " |\n")
	}
	return text.String()
}

// wrapped breaks a text into lines of so many characters.
func wrapped(text string, width int) string {
	var out strings.Builder
	line := 0
	for _, word := range strings.Fields(text) {
		n := utf8.RuneCountInString(word)
		if line > 0 && line+1+n > width {
			out.WriteByte('\n')
			line = 0
		} else if line > 0 {
			out.WriteByte(' ')
			line++
		}
		out.WriteString(word)
		line += n
	}
	if line > 0 {
		out.WriteByte('\n')
	}
	return out.String()
}

// number writes a value with about three digits, and nothing measured as "-".
func number(v float64) string {
	switch {
	case v == 0:
		return "-"
	case v < 10:
		return fmt.Sprintf("%.2f", v)
	case v < 100:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.0f", v)
}

// ratioText is a ratio's median, smallest and largest.
func ratioText(s spread) string {
	switch s.n {
	case 0:
		return "-"
	case 1:
		return fmt.Sprintf("%.2f", s.median)
	}
	return fmt.Sprintf("%.2f (%.2f-%.2f)", s.median, s.min, s.max)
}
