package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"xapi-nbd/internal/manpages"
)

// Every command has a page that names all its flags and its exit status.
func TestManPages(t *testing.T) {
	edition, err := manpages.CurrentEdition("../../VERSION")
	if err != nil {
		t.Fatal(err)
	}
	book := manpages.Book{
		Root: newRootCommand(streams{}), Section: "1", Edition: edition, See: []string{"xapi-nbd(8)"},
		More: func(cmd *cobra.Command) string {
			if cmd.HasParent() {
				return exitCodesHelp
			}
			return ""
		},
	}
	dir := manpages.Dir(t.TempDir())
	if err := book.Write(dir); err != nil {
		t.Fatal(err)
	}
	if err := book.Check(dir); err != nil {
		t.Error(err)
	}
	for page, wants := range map[string][]string{
		"nbd-tool-copy.1":  {"(default 1m)", "\n.SH SIGNALS\n.TP\n", "(default 10809)"},
		"nbd-tool-serve.1": {"(default localhost:10809)", "\n.SH SIGNALS\n"},
	} {
		text, err := os.ReadFile(filepath.Join(dir, page))
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range wants {
			if !strings.Contains(string(text), want) {
				t.Errorf("%s lacks %q", page, want)
			}
		}
	}
	manpages.Lint(t, dir, "nbd-tool*.1")
}
