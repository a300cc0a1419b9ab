package manpages

import (
	"fmt"
	"slices"
	"strings"
)

// roff is the source of a page for man(7), in ASCII.
type roff struct{ strings.Builder }

func (w *roff) line(text string) { w.WriteString(text + "\n") }

// title begins a page.
func (w *roff) title(name, section, program string, e Edition) {
	w.line(fmt.Sprintf(`.TH "%s" "%s" "%s" "%s" "%s"`, escape(strings.ToUpper(name)), section,
		e.Date.UTC().Format("2006-01-02"), escape(program+" "+e.Version), "NBD"))
	w.line(".nh")
	w.line(".ad l")
}

func (w *roff) section(title string) { w.line(".SH " + title) }

// item is a term, in roff, and the text about it.
func (w *roff) item(term, text string) {
	w.line(".TP")
	w.line(term)
	w.line(escape(text))
}

// paragraphs are separated by empty lines.
func (w *roff) paragraphs(text string) {
	for i, p := range strings.Split(text, "\n\n") {
		if i > 0 {
			w.line(".PP")
		}
		for row := range strings.Lines(p) {
			w.line(escape(strings.TrimSuffix(row, "\n")))
		}
	}
}

// literal is text whose lines stay as they are.
func (w *roff) literal(text string) {
	w.line(".nf")
	for row := range strings.Lines(text) {
		w.line(escape(strings.TrimSuffix(row, "\n")))
	}
	w.line(".fi")
}

// escape escapes the characters that are special for roff, and those that are not ASCII.
func escape(text string) string {
	var b strings.Builder
	for i, r := range text {
		switch {
		case i == 0 && r == '.':
			b.WriteString(`\&.`)
		case special[r] != "":
			b.WriteString(special[r])
		case r > '~':
			fmt.Fprintf(&b, `\[u%04X]`, r)
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}

var special = map[rune]string{
	'\\': `\(rs`, '-': `\-`, '"': `\(dq`, '\'': `\(aq`, '`': `\(ga`, '^': `\(ha`, '~': `\(ti`,
}

// section is a part of a page: terms and their meanings.
type section struct {
	title string
	rows  []row
}

type row struct{ term, text string }

// sectionTitles are the titles that man pages have for the lists of a help text.
var sectionTitles = map[string]string{"Exit codes:": "EXIT STATUS", "Signals:": "SIGNALS", "Files:": "FILES"}

// split takes the lists out of a help text. A list is a paragraph whose first
// line is a key of sectionTitles. Each of its entries begins with a line that is
// indented by two blanks, the term, two blanks or more, and the text; lines that
// are indented further continue the text.
func split(long string) (body string, sections []section) {
	var rest []string
	for _, p := range strings.Split(strings.TrimSpace(long), "\n\n") {
		head, list, _ := strings.Cut(p, "\n")
		title := sectionTitles[head]
		if title == "" {
			rest = append(rest, p)
			continue
		}
		s := section{title: title}
		for line := range strings.Lines(list) {
			entry := strings.TrimPrefix(strings.TrimSuffix(line, "\n"), "  ")
			if strings.HasPrefix(entry, " ") && len(s.rows) > 0 {
				s.rows[len(s.rows)-1].text += " " + strings.TrimSpace(entry)
				continue
			}
			term, text, _ := strings.Cut(entry, "  ")
			s.rows = append(s.rows, row{term, strings.TrimSpace(text)})
		}
		sections = append(sections, s)
	}
	slices.SortFunc(sections, func(a, b section) int { return strings.Compare(a.title, b.title) }) // EXIT STATUS first
	return strings.Join(rest, "\n\n"), sections
}
