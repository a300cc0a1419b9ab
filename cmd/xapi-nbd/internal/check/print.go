package check

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"xapi-nbd/cmd/xapi-nbd/internal/text"
)

// JSON writes the report as JSON.
func (r *Report) JSON(w io.Writer) error {
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

// Text writes the report in lines of at most 80 columns: each finding, and below it,
// indented, its remedy.
func (r *Report) Text(w io.Writer) error {
	var b strings.Builder
	for _, f := range r.Findings {
		lines := text.Wrap(f.Subject+" — "+f.Detail, checkWidth-levelColumns-2)
		fmt.Fprintf(&b, "%-*s%s\n", levelColumns, f.Level, lines[0])
		text.Indent(&b, levelColumns+2, lines[1:])
		for line := range strings.Lines(f.Remedy) {
			text.Indent(&b, levelColumns+4, text.Wrap(line, checkWidth-levelColumns-4))
		}
	}
	fmt.Fprintf(&b, "\n%s, %s.\n", text.Count(r.Problems, "problem"), text.Count(r.Warnings, "warning"))
	_, err := io.WriteString(w, b.String())
	return err
}
