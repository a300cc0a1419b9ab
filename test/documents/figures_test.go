package documents

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// readFile returns the text of a file of the module.
func readFile(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, path))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// The figures in README are those of the last run of the benchmark.
func TestFigures(t *testing.T) {
	results := readFile(t, "docs/results/BENCHMARKS.md")
	rows := regexp.MustCompile("(?m)^\\|[^|]+\\| `([^`]+)` \\| ([\\d.]+) \\| ([\\d.]+) \\| ([\\d.]+) \\|$").FindAllStringSubmatch(readFile(t, "README.md"), -1)
	if len(rows) < 3 {
		t.Errorf("found %d rows with figures in README, want at least 3", len(rows))
	}
	for _, row := range rows {
		_, after, found := strings.Cut(results, "\n| "+row[1]+" | ours | ")
		if !found {
			t.Errorf("the results have no case %s", row[1])
			continue
		}
		lines := strings.SplitN("| ours | "+after, "\n", 4)
		for i, server := range []string{"ours", "nbdkit", "qemu-nbd"} {
			if !strings.Contains(lines[i], "| "+server+" | "+row[2+i]+" |") {
				t.Errorf("%s: README has %s of %s, and the results have: %s", row[1], row[2+i], server, lines[i])
			}
		}
	}
}

// TestForeignLibraries: ARCHITECTURE has the purpose of every module that go.mod requires.
func TestForeignLibraries(t *testing.T) {
	text := readFile(t, "docs/ARCHITECTURE.md")
	direct, _, _ := strings.Cut(readFile(t, "go.mod"), ")")
	modules := regexp.MustCompile(`(?m)^\t(\S+) v`).FindAllStringSubmatch(direct, -1)
	if len(modules) < 10 {
		t.Errorf("found %d modules, want at least 10", len(modules))
	}
	version := regexp.MustCompile(`/v\d+$`)
	for _, m := range modules {
		name := version.ReplaceAllString(strings.TrimPrefix(m[1], "github.com/"), "")
		if !strings.Contains(text, name) {
			t.Errorf("the table of libraries lacks %s", name)
		}
	}
}
