package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
)

// report is all that is said at the end.
type report struct {
	command string
	quick   bool
	machine machine
	tables  []table
	log     log
	results results
}

// newReport asks the programs for their versions.
func newReport(ctx context.Context, b *bench) *report {
	return &report{
		command: "go run ./test/bench" + quoted(b.opts.args),
		quick:   b.opts.quick,
		machine: b.machine(ctx),
		tables:  allTables(&b.results, b.opts),
		log:     b.log,
		results: b.results,
	}
}

// quoted are arguments as a shell takes them.
func quoted(args []string) string {
	var text strings.Builder
	for _, a := range args {
		if strings.ContainsAny(a, " |*?^$&;()<>[]{}\\\"'`#~!") {
			a = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
		}
		text.WriteString(" " + a)
	}
	return text.String()
}

// preface are the lines before the tables.
func (r *report) preface() []string {
	m := r.machine
	lines := []string{
		"Command: `" + r.command + "`",
		fmt.Sprintf("Machine: %s, %d cores, %.0f GiB of memory, %s, TCP with %s", m.CPU, m.Cores, m.Memory, m.Kernel, m.TCP),
		"Images: in " + m.Images,
		"Versions: " + strings.Join(m.Versions, "; "),
	}
	if r.quick {
		lines = append(lines, "A quick run: the sizes are too small for the numbers to mean anything.")
	}
	if c := r.log[ciphers]; len(c) > 0 {
		lines = append(lines, "TLS with GnuTLS's clients: "+strings.Join(c, "; "))
	}
	for _, s := range r.log[skipped] {
		lines = append(lines, "Not measured: "+s)
	}
	for _, s := range r.results.failures() {
		lines = append(lines, fmt.Sprintf("Failed: %s, %s, round %d: %s", s.Case, s.Server, s.Round, s.Failed))
	}
	return lines
}

// legend is said once for all tables.
const legend = "MiB/s, reads/s and latencies are medians of the rounds. \"ours is\" is ours/peer within one round: the median, and the smallest " +
	"and largest. CPU is that of the server's process, user and system. \"peak MiB\" is the largest resident memory of the server, what it kept from earlier cases included."

// writeText writes for a terminal of 100 columns.
func (r *report) writeText(w io.Writer) error {
	for _, line := range r.preface() {
		if _, err := io.WriteString(w, wrapped(line, 100)); err != nil {
			return err
		}
	}
	if _, err := io.WriteString(w, "\n"+wrapped(legend, 100)); err != nil {
		return err
	}
	for _, t := range r.tables {
		if err := t.writeText(w); err != nil {
			return err
		}
	}
	return nil
}

// markdown is the generated part of the document.
func (r *report) markdown() string {
	var text strings.Builder
	text.WriteString("## Results\n\n")
	for _, line := range r.preface() {
		text.WriteString("- " + line + "\n")
	}
	text.WriteString("\n" + wrapped(legend, 100) + "\n")
	for _, t := range r.tables {
		text.WriteString(t.markdown() + "\n")
	}
	text.WriteString("### Commands\n\nWhere several servers, cases or images differ in nothing else, one stands for all.\n")
	for _, about := range []topic{serverCommand, clientCommand} {
		fmt.Fprintf(&text, "\nThe %s:\n\n```\n%s\n```\n", about, strings.Join(r.log[about], "\n"))
	}
	return text.String()
}

func (r *report) writeMarkdown(path string) error {
	text, err := spliceMarkdown(path, r.markdown())
	if err != nil {
		return err
	}
	return os.WriteFile(path, []byte(text), 0o644)
}

// writeJSON writes the samples of every round.
func (r *report) writeJSON(path string) error {
	text, err := json.MarshalIndent(struct {
		Command string   `json:"command"`
		Machine machine  `json:"machine"`
		Skipped []string `json:"skipped,omitempty"`
		Samples []sample `json:"samples"`
	}{r.command, r.machine, r.log[skipped], r.results.samples}, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}

// The marks around what is generated.
const (
	beginMark = "<!-- begin generated -->"
	endMark   = "<!-- end generated -->"
)

// newDocument is what there is to be generated into at first.
const newDocument = "# Benchmarks\n\n`make bench` writes what stands between the marks; the rest is written by hand.\n\n" +
	beginMark + "\n" + endMark + "\n"

// spliceMarkdown returns the text of a file with what is between the marks
// replaced. A file that there is must have the marks, once each: nothing that
// somebody wrote is to be lost.
func spliceMarkdown(path, generated string) (string, error) {
	text, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		text, err = []byte(newDocument), nil
	}
	if err != nil {
		return "", err
	}
	spliced, err := replaceMarked(string(text), generated)
	if err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	return spliced, nil
}

func replaceMarked(text, generated string) (string, error) {
	before, rest, ok := strings.Cut(text, beginMark)
	_, after, ok2 := strings.Cut(rest, endMark)
	if !ok || !ok2 || strings.Count(text, beginMark) != 1 || strings.Count(text, endMark) != 1 {
		return "", fmt.Errorf("wants the lines %q and %q, once each and in this order", beginMark, endMark)
	}
	return before + beginMark + "\n" + strings.TrimRight(generated, "\n") + "\n" + endMark + after, nil
}
