package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"xapi-nbd/cmd/internal/manpages"
)

// Every command has a page that names all its flags.
func TestManPages(t *testing.T) {
	dir := manpages.Dir(t.TempDir())
	root := newRootCommand(streams{})
	if err := manpages.Write(dir, root, "1"); err != nil {
		t.Fatal(err)
	}
	for _, cmd := range append([]*cobra.Command{root}, root.Commands()...) {
		if !cmd.IsAvailableCommand() {
			continue
		}
		name := strings.ReplaceAll(cmd.CommandPath(), " ", "-") + ".1"
		page, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Error(err)
			continue
		}
		cmd.NonInheritedFlags().VisitAll(func(f *pflag.Flag) {
			if flag := strings.ReplaceAll(f.Name, "-", `\-`); !strings.Contains(string(page), flag) && !strings.Contains(string(page), f.Name) {
				t.Errorf("%s does not name --%s", name, f.Name)
			}
		})
	}
}
