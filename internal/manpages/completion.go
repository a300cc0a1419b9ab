package manpages

import (
	"errors"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
)

// CompletionDir is where a test leaves completions: the folder that the packages'
// build names, else the given one.
func CompletionDir(otherwise string) string {
	if dir := os.Getenv("COMPLETION_DIR"); dir != "" {
		return dir
	}
	return otherwise
}

// WriteCompletions writes the scripts with which bash, zsh and fish complete root's command
// line into dir, which it makes: <name>.bash, <name>.zsh and <name>.fish. The
// scripts ask the program itself, so they fit every version of it.
func WriteCompletions(dir string, root *cobra.Command) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	name := filepath.Join(dir, root.Name())
	return errors.Join(
		root.GenBashCompletionFileV2(name+".bash", true),
		root.GenZshCompletionFile(name+".zsh"),
		root.GenFishCompletionFile(name+".fish", true),
	)
}
