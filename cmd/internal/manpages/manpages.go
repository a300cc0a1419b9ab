// Package manpages makes man pages from the definitions of a command line. Only
// tests and the man target of the Makefile use it, so that its modules are not
// part of the programs.
package manpages

import (
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
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
