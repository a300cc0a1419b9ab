package main

import (
	"fmt"
	"io"
	"strings"

	"xapi-nbd/test/internal/testevents"
)

// report collects events and prints the summary. It counts tests without subtests, and tests
// with subtests that failed or were skipped themselves, so that nothing counts twice.
type report struct {
	w                       io.Writer
	packages                map[string]*pkg
	skips                   []string
	passed, failed, skipped int
}

// pkg is a package whose tests are still running.
type pkg struct {
	output []string // not of any test: shuffle seed, panics, leaks found by TestMain
	tests  map[string]*test
	order  []string
	failed int
}

type test struct {
	output       []string
	result       string // "" while it runs: also when a panic ended the program
	parent       bool   // has subtests
	failedInside bool   // a subtest failed
}

func newReport(w io.Writer) *report {
	return &report{w: w, packages: map[string]*pkg{}}
}

// read takes events until in ends.
func (r *report) read(in io.Reader) error { return testevents.Read(in, r.w, r.event) }

func (r *report) event(e testevents.Event) {
	if e.Action == "build-output" {
		fmt.Fprint(r.w, e.Output)
		return
	}
	if e.Package == "" {
		return // the end of a build
	}
	p := r.packages[e.Package]
	if p == nil {
		p = &pkg{tests: map[string]*test{}}
		r.packages[e.Package] = p
	}
	if e.Test == "" {
		r.packageEvent(p, e)
		return
	}
	t := p.test(e.Test)
	switch e.Action {
	case "output":
		t.output = append(t.output, e.Output)
	case "pass", "fail", "skip":
		t.result = e.Action
		r.testEnd(p, t, e)
	}
}

// test returns the named test of p, makes it if there is none, and marks its parent.
func (p *pkg) test(name string) *test {
	t := p.tests[name]
	if t == nil {
		t = &test{}
		p.tests[name] = t
		p.order = append(p.order, name)
		if i := strings.LastIndexByte(name, '/'); i >= 0 {
			p.test(name[:i]).parent = true
		}
	}
	return t
}

func (r *report) testEnd(p *pkg, t *test, e testevents.Event) {
	switch e.Action {
	case "pass":
		if !t.parent {
			r.passed++
		}
	case "skip":
		r.skipped++
		r.skips = append(r.skips, fmt.Sprintf("skipped: %s: %s (%s)", e.Test, reason(t.output), e.Package))
	case "fail":
		if !t.failedInside {
			r.failed++
			p.failed++
		}
		for name := e.Test; strings.Contains(name, "/"); {
			name = name[:strings.LastIndexByte(name, '/')]
			p.test(name).failedInside = true
		}
	}
	if e.Action != "fail" {
		t.output = nil // of no use any more
	}
}

func (r *report) packageEvent(p *pkg, e testevents.Event) {
	switch e.Action {
	case "output":
		p.output = append(p.output, e.Output)
		return
	case "pass":
		fmt.Fprintf(r.w, "ok    %s  %.1fs\n", e.Package, e.Elapsed)
	case "skip":
		fmt.Fprintf(r.w, "-     %s  no tests\n", e.Package)
	case "fail":
		r.packageFailed(p, e)
	default:
		return
	}
	delete(r.packages, e.Package)
}

func (r *report) packageFailed(p *pkg, e testevents.Event) {
	if p.failed == 0 { // it did not build, panicked, or TestMain failed it
		r.failed++
	}
	why := ""
	if e.FailedBuild != "" {
		why = "  does not build"
	}
	fmt.Fprintf(r.w, "FAIL  %s  %.1fs%s\n", e.Package, e.Elapsed, why)
	for _, name := range p.order {
		if t := p.tests[name]; t.result == "fail" || t.result == "" {
			r.indent(t.output)
		}
	}
	r.indent(p.output)
}

func (r *report) indent(lines []string) {
	for _, line := range lines {
		if !strings.HasPrefix(line, "=== ") {
			fmt.Fprint(r.w, "      ", strings.TrimSuffix(line, "\n"), "\n")
		}
	}
}

// reason returns the output of a skipped test without the lines of go test.
func reason(output []string) string {
	var said []string
	for _, line := range output {
		line = strings.TrimSpace(line)
		if line != "" && !strings.HasPrefix(line, "=== ") && !strings.HasPrefix(line, "--- SKIP") {
			said = append(said, line)
		}
	}
	if len(said) == 0 {
		return "no reason given"
	}
	return strings.Join(said, " ")
}

// close prints the skipped tests and the count. A package that has not ended is a failure,
// because go test was killed.
func (r *report) close() {
	for name, p := range r.packages {
		r.packageFailed(p, testevents.Event{Package: name})
	}
	for _, s := range r.skips {
		fmt.Fprintln(r.w, s)
	}
	fmt.Fprintf(r.w, "%d passed, %d failed, %d skipped\n", r.passed, r.failed, r.skipped)
}
