package main

import (
	"testing"

	"xapi-nbd/cmd/internal/manpages"
)

// Every command has a page that names all its flags.
func TestManPages(t *testing.T) {
	const section = "8"
	dir := manpages.Dir(t.TempDir())
	root := newRootCommand()
	if err := manpages.Write(dir, root, section); err != nil {
		t.Fatal(err)
	}
	if err := manpages.Check(dir, root, section); err != nil {
		t.Error(err)
	}
}
