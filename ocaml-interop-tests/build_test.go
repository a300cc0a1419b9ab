package interop

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"xapi-nbd/test/leaks"
	"xapi-nbd/test/requires"
)

// timeout bounds every wait for a program. Only failing tests reach it.
const timeout = time.Minute

// buildDir is the folder of the built programs. It is removed after the tests.
var buildDir string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "interop")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	buildDir = dir
	leaks.Main(m, goleak.Cleanup(func(code int) {
		os.RemoveAll(dir)
		os.Exit(code)
	}))
}

// library is a library of ocamlfind. Another one may have the same name: the original's is
// also called nbd.
type library struct {
	name    string
	archive string // distinguishes it from others of its name
	debian  string // its package
}

// program is a program in OCaml. The first test that needs it builds it.
type program struct {
	name    string // of the source without .ml
	library library
	logs    bool // to standard error, where nothing else says anything unless it fails

	once sync.Once
	err  error
}

// build returns the path of the program, or ends the test.
func (p *program) build(t *testing.T) string {
	t.Helper()
	ocamlfind := requires.Tool(t, "ocamlfind")
	requires.Tool(t, "ocamlopt")
	p.library.require(t, ocamlfind)
	p.once.Do(func() { p.err = p.compile(ocamlfind) })
	if p.err != nil {
		t.Fatal(p.err)
	}
	return filepath.Join(buildDir, p.name)
}

// require ends the test if the library is not installed; requires.Tool is for programs.
func (l library) require(t *testing.T, ocamlfind string) {
	t.Helper()
	out, err := exec.Command(ocamlfind, "query", "-predicates", "native", "-a-format", l.name).Output()
	if err == nil && strings.Contains(string(out), l.archive) {
		return
	}
	reason := fmt.Sprintf("needs the OCaml library %s (Debian package %s)", l.name, l.debian)
	if os.Getenv("STRICT") == "1" {
		t.Fatalf("%s, and STRICT=1 allows no skip", reason)
	}
	t.Skip(reason)
}

// compile compiles a copy, because the compiler writes files beside the source.
func (p *program) compile(ocamlfind string) error {
	source, err := os.ReadFile(p.name + ".ml")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(buildDir, p.name+".ml"), source, 0o600); err != nil {
		return err
	}
	cmd := exec.Command(ocamlfind, "ocamlopt", "-thread", "-package", p.library.name, "-linkpkg", p.name+".ml", "-o", p.name)
	cmd.Dir = buildDir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building %s: %w\n%s", p.name, err, out)
	}
	return nil
}

// facts are the lines "name: value" that a program printed.
type facts map[string]string

// run runs a program of this folder to its end. failure is its last line if it exits with
// status 1; any other status fails the test.
func (p *program) run(t *testing.T, args ...string) (said facts, failure string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	var stderr strings.Builder
	cmd := exec.CommandContext(ctx, p.build(t), args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	said = make(facts)
	for line := range strings.Lines(string(out)) {
		line = strings.TrimSuffix(line, "\n")
		if text, failed := strings.CutPrefix(line, "error: "); failed {
			failure = text
		} else if i := strings.LastIndex(line, ": "); i >= 0 {
			said[line[:i]] = line[i+2:]
		}
	}
	var exit *exec.ExitError
	switch {
	case err == nil && failure == "":
	case errors.As(err, &exit) && exit.ExitCode() == 1 && failure != "":
	default:
		t.Fatalf("%s %q: %v\n%s%s", p.name, args, err, out, &stderr)
	}
	return said, failure
}

// running is a program that serves.
type running struct {
	facts facts  // printed before it was ready
	stop  func() // may be called again
}

// start starts a program of this folder, which prints lines "name value" and then "ready", and
// ends at the end of its standard input: by stop, or at the end of the test.
func (p *program) start(t *testing.T, args ...string) running {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 2*timeout)
	cmd := exec.CommandContext(ctx, p.build(t), args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	stdin, err1 := cmd.StdinPipe()
	stdout, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2, cmd.Start()); err != nil {
		cancel()
		t.Fatal(err)
	}
	r := running{facts: make(facts), stop: sync.OnceFunc(func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil || stderr.Len() > 0 && !p.logs {
			t.Errorf("%s ended with %v; it printed:\n%s", p.name, err, &stderr)
		}
		cancel()
	})}
	t.Cleanup(r.stop)
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), " ")
		if name == "ready" {
			return r
		}
		r.facts[name] = value
	}
	t.Fatalf("%s does not start", p.name)
	return r
}
