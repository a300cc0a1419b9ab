package requires

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// setShort switches short mode for one test.
func setShort(t *testing.T, on string) {
	t.Helper()
	before := flag.Lookup("test.short").Value.String()
	if err := flag.Set("test.short", on); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = flag.Set("test.short", before) }) // it was valid before
}

// fakeTB records how a test ends, and returns where a real one ends the test.
type fakeTB struct{ skipped, failed string }

func (f *fakeTB) Helper()                           {}
func (f *fakeTB) Skipf(format string, args ...any)  { f.skipped = fmt.Sprintf(format, args...) }
func (f *fakeTB) Fatalf(format string, args ...any) { f.failed = fmt.Sprintf(format, args...) }

// TestShort: short mode skips for everything that is not Go, and STRICT does not matter.
func TestShort(t *testing.T) {
	setShort(t, "true")
	t.Setenv("STRICT", "1")
	for name, require := range map[string]func(tb TB){
		"sh":                   func(tb TB) { Tool(tb, "sh") },
		"root":                 Root,
		"the Python module os": func(tb TB) { PythonModule(tb, "os") },
		"loop devices":         LoopDevices,
	} {
		var tb fakeTB
		require(&tb)
		if want := (fakeTB{skipped: "needs " + name + ", which short mode does not use"}); tb != want {
			t.Errorf("%s: got %+v, want %+v", name, tb, want)
		}
	}
}

func TestTool(t *testing.T) {
	setShort(t, "false")
	dir := t.TempDir()
	here := filepath.Join(dir, "some-tool")
	if err := os.WriteFile(here, []byte("#!/bin/sh\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
	tests := []struct {
		name, tool, strict string
		path               string
		want               fakeTB
	}{
		{"there", "some-tool", "", here, fakeTB{}},
		{"there, strict", "some-tool", "1", here, fakeTB{}},
		{"missing", "no-such-tool", "", "", fakeTB{skipped: "needs no-such-tool"}},
		{"missing, strict", "no-such-tool", "1", "", fakeTB{failed: "needs no-such-tool, and STRICT=1 allows no skip"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("STRICT", tt.strict)
			var tb fakeTB
			if got := Tool(&tb, tt.tool); got != tt.path {
				t.Errorf("got path %q, want %q", got, tt.path)
			}
			if tb != tt.want {
				t.Errorf("got %+v, want %+v", tb, tt.want)
			}
		})
	}
}

func TestToolsFile(t *testing.T) {
	if got := packageOf("fsck.fat"); got != "dosfstools" {
		t.Errorf("package of fsck.fat: got %q, want dosfstools", got)
	}
	if got := packageOf("promtool"); got != "prometheus" {
		t.Errorf("package of promtool: got %q, want prometheus", got)
	}
	if got := packageOf("program"); got != "" {
		t.Errorf("got %q from a comment line", got)
	}
	for line := range strings.Lines(toolsFile) {
		f := strings.Fields(line)
		if len(f) == 3 && f[2] == "extract" {
			f = f[:2]
		}
		if len(f) != 2 && !strings.HasPrefix(line, "#") {
			t.Errorf("line %q: want program, package and perhaps extract", line)
		}
	}
}

func TestRoot(t *testing.T) {
	setShort(t, "false")
	t.Setenv("STRICT", "")
	var tb fakeTB
	Root(&tb)
	if skipped, root := tb.skipped != "", os.Geteuid() == 0; skipped == root {
		t.Errorf("got skipped %v, want %v for user id %d", skipped, !root, os.Geteuid())
	}
	LoopDevices(&tb) // only that it ends, in one way or the other
}
