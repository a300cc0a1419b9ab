package main

import (
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"

	"xapi-nbd/test/internal/testevents"
)

// results are those of all packages.
type results struct {
	progress        io.Writer
	packages        map[string]*packageResults
	ends            ends
	peers           []peer
	passed, skipped int // tests without subtests
}

// peer has the values of a line "peer: name version".
type peer struct{ name, version string }

type packageResults struct {
	output  map[string][]string // by test, "" for the package's own
	parents map[string]bool     // tests with subtests
	met     map[string]bool     // test functions that met a peer; the others are of the tests themselves
	// elsewhere are the test functions whose results are in the table of ends.
	elsewhere map[string]bool
	rows      []*row // in the order of the run
}

// row has the actions of a peer in a mode.
type row struct {
	function   string // of the tests
	peer, mode string
	passed     []string
	missing    []missing
}

// missing is an action that was not run, and the reason.
type missing struct {
	action string // "" for the whole row
	kind   string // "n/a" or "NOT tested"
	why    string
}

func newResults(progress io.Writer) *results {
	return &results{progress: progress, packages: map[string]*packageResults{}}
}

// read takes events until in ends.
func (r *results) read(in io.Reader) error { return testevents.Read(in, r.progress, r.event) }

func (r *results) event(e testevents.Event) {
	if e.Package == "" { // of building
		fmt.Fprint(r.progress, e.Output)
		return
	}
	p := r.packages[e.Package]
	if p == nil {
		p = &packageResults{output: map[string][]string{}, parents: map[string]bool{}, met: map[string]bool{}, elsewhere: map[string]bool{}}
		r.packages[e.Package] = p
	}
	switch e.Action {
	case "run":
		if i := strings.LastIndexByte(e.Test, '/'); i >= 0 {
			p.parents[e.Test[:i]] = true
		}
	case "output":
		p.output[e.Test] = append(p.output[e.Test], e.Output)
		r.line(p, e)
	case "pass", "skip", "fail":
		r.ended(p, e)
	}
}

// said handles a line that a test logged.
var said = regexp.MustCompile(`^\s*\S+\.go:\d+: (.*)\n?$`)

// line handles the lines that tests log for the report: "peer: name version",
// "n/a: peer/mode/action: reason" and those of ends.
func (r *results) line(p *packageResults, e testevents.Event) {
	found := said.FindStringSubmatch(e.Output)
	if found == nil {
		return
	}
	function, _, _ := strings.Cut(e.Test, "/")
	if r.ends.line(found[1]) {
		p.elsewhere[function] = true
	} else if text, ok := strings.CutPrefix(found[1], "peer: "); ok {
		p.met[function] = true
		r.peer(text)
	} else if text, ok := strings.CutPrefix(found[1], "n/a: "); ok {
		if path, reason, ok := strings.Cut(text, ": "); ok {
			row, action := p.row(function + "/" + path)
			row.missing = append(row.missing, missing{action, "n/a", reason})
		}
	}
}

// version returns the first word that begins with a digit.
var version = regexp.MustCompile(`^(.*?) +([0-9].*)$`)

// peer notes a peer once, however often it is met.
func (r *results) peer(text string) {
	fresh := peer{name: text}
	if found := version.FindStringSubmatch(text); found != nil {
		fresh = peer{found[1], found[2]}
	}
	if !slices.Contains(r.peers, fresh) {
		r.peers = append(r.peers, fresh)
	}
}

// row returns the row of a test by its name, made if there is none, and the action.
func (p *packageResults) row(test string) (r *row, action string) {
	function, peer, mode, action := place(test)
	for _, r := range p.rows {
		if r.function == function && r.peer == peer && r.mode == mode {
			return r, action
		}
	}
	r = &row{function: function, peer: peer, mode: mode}
	p.rows = append(p.rows, r)
	return r, action
}

func (r *results) ended(p *packageResults, e testevents.Event) {
	switch {
	case e.Action == "fail":
		fmt.Fprintf(r.progress, "FAIL  %s %s\n", e.Package, e.Test)
		for _, line := range p.output[e.Test] {
			fmt.Fprint(r.progress, "      ", line)
		}
	case e.Test == "":
		fmt.Fprintf(r.progress, "ok    %s  %.1fs\n", e.Package, e.Elapsed)
	case e.Action == "skip":
		r.skipped++
		row, action := p.row(e.Test)
		row.missing = append(row.missing, missing{action, "NOT tested", reason(p.output[e.Test])})
	case !p.parents[e.Test]:
		r.passed++
		row, action := p.row(e.Test)
		row.passed = append(row.passed, action)
	}
	delete(p.output, e.Test)
}

// reason returns the log of a skipped test, without file and line and without a repeated
// "not tested".
func reason(output []string) string {
	for _, line := range output {
		if found := said.FindStringSubmatch(line); found != nil && found[1] != "" {
			return strings.Replace(found[1], "NOT tested: ", "", 1)
		}
	}
	return "no reason given"
}

// place parses the name of a test, Test…/peer/mode/action. With fewer parts the function is
// the peer. Test names have no spaces, but the option has an underscore.
func place(test string) (function, peer, mode, action string) {
	function, _, _ = strings.Cut(test, "/")
	spaced := strings.ReplaceAll(strings.ReplaceAll(test, "_", " "), "EXPORT NAME", "EXPORT_NAME")
	parts := strings.SplitN(spaced, "/", 4)
	switch len(parts) {
	case 1:
		return function, words(function), "", ""
	case 2:
		return function, words(function), "", parts[1]
	case 3:
		return function, parts[1], parts[2], ""
	}
	return function, parts[1], parts[2], parts[3]
}

var capital = regexp.MustCompile(`([a-z0-9])([A-Z])`)

// words takes the name of a test function apart.
func words(function string) string {
	return capital.ReplaceAllString(strings.TrimPrefix(function, "Test"), "$1 $2")
}
