package documents

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var (
	withoutRace = regexp.MustCompile(`(?m)^\t\$\(GO\) run \./test/report -run '([^']+)' (.*)$`)
	testFunc    = regexp.MustCompile(`(?m)^func (Test\w+)\(`)
)

// TestMakeTestRunsAll: a test whose file is left out of builds with the race detector is among
// those that make test runs without it. After a change of its name alone it would never run.
func TestMakeTestRunsAll(t *testing.T) {
	makefile, err := os.ReadFile(filepath.Join(root, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	command := withoutRace.FindSubmatch(makefile)
	if command == nil {
		t.Fatal("the Makefile has no run without the race detector")
	}
	names, packages := regexp.MustCompile(string(command[1])), strings.Fields(string(command[2]))
	found := 0
	err = filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil || !strings.HasPrefix(string(text), "//go:build !race\n") {
			return err
		}
		folder, err := filepath.Rel(root, filepath.Dir(path))
		for _, m := range testFunc.FindAllStringSubmatch(string(text), -1) {
			found++
			if !slices.Contains(packages, "./"+filepath.ToSlash(folder)) || !names.MatchString(m[1]) {
				t.Errorf("make test never runs %s in %s", m[1], path)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if found < 3 {
		t.Errorf("found %d such tests, want 3 at least", found)
	}
}
