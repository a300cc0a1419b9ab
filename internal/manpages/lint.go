package manpages

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"xapi-nbd/test/requires"
)

// Lint fails the test unless groff reads the pages in dir that match pattern
// without a warning.
func Lint(t *testing.T, dir, pattern string) {
	t.Helper()
	t.Run("groff", func(t *testing.T) {
		groff := requires.Tool(t, "groff")
		pages, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil || len(pages) == 0 {
			t.Fatalf("no pages %s (%v)", pattern, err)
		}
		for _, page := range pages {
			cmd := exec.Command(groff, "-ww", "-man", "-Tutf8", page)
			var stdout, stderr strings.Builder
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			if err := cmd.Run(); err != nil || stderr.Len() > 0 || stdout.Len() == 0 {
				t.Errorf("%s: %v, %s", page, err, stderr.String())
			}
		}
	})
}
