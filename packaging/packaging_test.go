// Package packaging tests units, packages, their scripts and the firewall helper.
package packaging

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"xapi-nbd/test/requires"
)

// result is the output and the exit code of a command.
type result struct {
	code           int
	stdout, stderr string
}

// runIn runs a command with the environment env. It ends the test if the command cannot be
// started, and not if it fails.
func runIn(t *testing.T, env []string, name string, args ...string) result {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Env = env
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v", name, err)
	}
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// mustRun runs a command that must succeed and returns its output.
func mustRun(t *testing.T, env []string, name string, args ...string) string {
	t.Helper()
	r := runIn(t, env, name, args...)
	if r.code != 0 {
		t.Fatalf("%s %s: exit code %d\n%s%s", name, strings.Join(args, " "), r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

// watchSources opens every file of the project, so that go test does not use a cached result
// after a change: it tracks only files that the test's own process has opened.
func watchSources(t *testing.T) {
	t.Helper()
	err := filepath.WalkDir("..", func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && (entry.Name() == ".git" || entry.Name() == "bin"):
			return filepath.SkipDir
		case entry.Type().IsRegular():
			_, err = os.Stat(path)
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // somebody tidies up
		t.Fatal(err)
	}
}

// snapshot copies the project, so that two builds have the same sources even if files are
// edited meanwhile. The copy is a git repository without a commit. It returns the folder of
// the scripts.
func snapshot(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	tar := exec.Command("tar", "-c", "--exclude=./.git", "--exclude=./bin", "-C", "..", ".")
	untar := exec.Command("tar", "-x", "-C", dir)
	pipe, err := tar.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	untar.Stdin = pipe
	if err := tar.Start(); err != nil {
		t.Fatal(err)
	}
	if out, err := untar.CombinedOutput(); err != nil {
		t.Fatalf("copying the sources: %v\n%s", err, out)
	}
	_ = tar.Wait() // a file may be removed meanwhile, which is no fault
	mustRun(t, os.Environ(), "git", "init", "-q", dir)
	return filepath.Join(dir, "packaging")
}

// fakes is a PATH of fake commands beside a few real ones, and the folder with the state of
// the fakes.
type fakes struct {
	t    *testing.T
	path string
	know string
}

// newFakes makes fake commands; each name is that of a file in testdata, or one
// that stands for "name=file". The real ones are those that scripts need.
func newFakes(t *testing.T, names ...string) *fakes {
	t.Helper()
	watchSources(t)
	f := &fakes{t: t, path: t.TempDir(), know: t.TempDir()}
	for _, tool := range []string{"sh", "awk", "sed", "grep", "cat", "wc", "rm", "rmdir", "mkdir", "touch", "test"} {
		f.link(tool, requires.Tool(t, tool))
	}
	for _, name := range names {
		name, file, found := strings.Cut(name, "=")
		if !found {
			file = name
		}
		path, err := filepath.Abs(filepath.Join("testdata", file))
		if err != nil {
			t.Fatal(err)
		}
		f.link(name, path)
	}
	return f
}

func (f *fakes) link(name, target string) {
	f.t.Helper()
	if err := os.Symlink(target, filepath.Join(f.path, name)); err != nil {
		f.t.Fatal(err)
	}
}

// env is the environment in which only the fakes exist.
func (f *fakes) env(more ...string) []string {
	return append([]string{"PATH=" + f.path, "FAKE=" + f.know, "SYSCONFIG=" + filepath.Join(f.know, "sysconfig")}, more...)
}

// learn makes a file that the fakes look at.
func (f *fakes) learn(name, text string) {
	f.t.Helper()
	path := filepath.Join(f.know, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		f.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		f.t.Fatal(err)
	}
}

// log returns the lines that the fakes have logged since it was last called.
func (f *fakes) log() []string {
	f.t.Helper()
	path := filepath.Join(f.know, "log")
	data, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		f.t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		f.t.Fatal(err)
	}
	return strings.Split(strings.TrimSuffix(string(data), "\n"), "\n")
}
