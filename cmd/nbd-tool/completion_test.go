package main

import (
	"os/exec"
	"path/filepath"
	"testing"

	"xapi-nbd/internal/manpages"
	"xapi-nbd/test/requires"
)

// Each shell accepts its completion script.
func TestCompletionScripts(t *testing.T) {
	dir := manpages.CompletionDir(t.TempDir())
	root := newRootCommand(streams{})
	if err := manpages.WriteCompletions(dir, root); err != nil {
		t.Fatal(err)
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		t.Run(shell, func(t *testing.T) {
			program := requires.Tool(t, shell)
			script := filepath.Join(dir, root.Name()+"."+shell)
			if out, err := exec.Command(program, "-n", script).CombinedOutput(); err != nil {
				t.Errorf("%s cannot read its script: %v\n%s", shell, err, out)
			}
		})
	}
}
