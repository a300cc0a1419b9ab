// Package manpages makes man pages from the definitions of a command line. Only
// tests and the man target of the Makefile use it, so that its modules are not
// part of the programs.
package manpages

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
	"github.com/spf13/pflag"
)

// Write writes a page for root and one for each of its commands into dir, which
// it makes. The date is fixed: the same definitions give the same pages.
func Write(dir string, root *cobra.Command, section string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	date := time.Unix(0, 0).UTC()
	root.DisableAutoGenTag = true
	return doc.GenManTree(root, &doc.GenManHeader{Section: section, Date: &date, Source: root.Name(), Manual: "NBD"}, dir)
}

// Dir is where a test leaves its pages: the folder that the man target names,
// else the given one.
func Dir(otherwise string) string {
	if dir := os.Getenv("MAN_DIR"); dir != "" {
		return dir
	}
	return otherwise
}

// Check reports every command without a page in dir, and every flag that its
// command's page does not name.
func Check(dir string, root *cobra.Command, section string) error {
	var errs []error
	for _, cmd := range append([]*cobra.Command{root}, root.Commands()...) {
		if !cmd.IsAvailableCommand() {
			continue
		}
		name := strings.ReplaceAll(cmd.CommandPath(), " ", "-") + "." + section
		page, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		text := strings.ReplaceAll(string(page), `\-`, "-")
		cmd.NonInheritedFlags().VisitAll(func(f *pflag.Flag) {
			if !strings.Contains(text, "--"+f.Name) {
				errs = append(errs, fmt.Errorf("%s does not name --%s", name, f.Name))
			}
		})
	}
	return errors.Join(errs...)
}
