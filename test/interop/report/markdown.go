package main

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

const (
	begin = "<!-- begin generated -->\n"
	end   = "<!-- end generated -->\n"
)

// splice puts generated text into its place in a document.
func splice(document, generated string) (string, error) {
	head, rest, ok := strings.Cut(document, begin)
	_, tail, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		return "", errors.New("the lines that surround the generated part are missing")
	}
	return head + begin + generated + end + tail, nil
}

// markdown is the generated part of the document.
func (r *results) markdown() string {
	var b strings.Builder
	b.WriteString("\n| peer | version |\n|---|---|\n")
	for _, p := range r.peers {
		fmt.Fprintf(&b, "| %s | %s |\n", cell(p.name), cell(p.version))
	}
	b.WriteString(r.ends.markdown())
	for _, name := range slices.Sorted(maps.Keys(r.packages)) {
		if !r.packages[name].hasRows() {
			continue
		}
		_, short, _ := strings.Cut(name, "/")
		fmt.Fprintf(&b, "\n### %s\n\n| peer | mode | passed | not run, and why |\n|---|---|---|---|\n", short)
		p := r.packages[name]
		for _, row := range p.rows {
			if !p.shows(row) {
				continue
			}
			fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", cell(row.peer), cell(row.mode), cell(row.passedText()), cell(row.missingText()))
		}
	}
	fmt.Fprintf(&b, "\n%d passed, %d not tested.\n", r.passed, r.skipped)
	return b.String()
}

// hasRows reports whether the package has a table.
func (p *packageResults) hasRows() bool {
	return slices.ContainsFunc(p.rows, p.shows)
}

// shows reports whether the row is in the table.
func (p *packageResults) shows(r *row) bool {
	return !p.elsewhere[r.function] && (p.met[r.function] || len(r.missing) > 0)
}

func cell(text string) string {
	if text == "" {
		return "–"
	}
	return strings.ReplaceAll(text, "|", `\|`)
}

func (r *row) passedText() string {
	if len(r.passed) == 1 && r.passed[0] == "" {
		return "yes"
	}
	return strings.Join(r.passed, ", ")
}

// missingText lists the missing actions by their reason.
func (r *row) missingText() string {
	var reasons []string
	actions := map[string][]string{}
	for _, m := range r.missing {
		reason := m.kind + " (" + m.why + ")"
		if !slices.Contains(reasons, reason) {
			reasons = append(reasons, reason)
		}
		if m.action != "" {
			actions[reason] = append(actions[reason], m.action)
		}
	}
	for i, reason := range reasons {
		if actions[reason] != nil {
			reasons[i] = strings.Join(actions[reason], ", ") + ": " + reason
		}
	}
	return strings.Join(reasons, "; ")
}
