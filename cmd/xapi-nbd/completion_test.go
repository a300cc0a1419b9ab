package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/internal/manpages"
	"xapi-nbd/test/requires"
)

// TestCompletionScripts: each shell can parse its script.
func TestCompletionScripts(t *testing.T) {
	dir := manpages.CompletionDir(t.TempDir())
	root := newRootCommand()
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

// TestCompletion: the program answers the queries of the completion scripts.
func TestCompletion(t *testing.T) {
	tests := []struct {
		name string
		args []string
		want []string
	}{
		{"commands", []string{""}, []string{"serve", "cleanup", "version"}},
		{"beginning of a command", []string{"cle"}, []string{"cleanup"}},
		{"flags of no command", []string{"--cert"}, []string{"--certfile"}},
		{"beginning of a value", []string{"serve", "--log-level", "w"}, []string{"warning"}},
		{"value behind an equals sign", []string{"--tls=r"}, []string{"require"}},
		{"flags of a command", []string{"cleanup", "--state"}, []string{"--state-dir"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { wantCompleted(t, tt.args, tt.want) })
	}
}

// wantCompleted runs the program as the scripts do and compares the candidates.
func wantCompleted(t *testing.T, args, wants []string) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	if code := run(t.Context(), append([]string{"__complete"}, args...), &stdout, &stderr); code != 0 {
		t.Fatalf("got exit code %d, want 0: %s", code, stderr.String())
	}
	for _, want := range wants {
		if !strings.Contains("\n"+stdout.String(), "\n"+want) {
			t.Errorf("%q: got %q, want a line with %s", args, stdout.String(), want)
		}
	}
}

// TestCompletionOfValues: every command completes the values of flags with a fixed set of
// values.
func TestCompletionOfValues(t *testing.T) {
	root := newRootCommand()
	flags := 0
	for _, cmd := range append(root.Commands(), root) {
		path := strings.Fields(cmd.CommandPath())[1:]
		for _, e := range config.Enumerated {
			flag := strings.ReplaceAll(e.Key, "_", "-")
			if cmd.Flags().Lookup(flag) == nil {
				continue
			}
			flags++
			wantCompleted(t, append(path, "--"+flag, ""), append(e.Values, ":4")) // :4 is no file names
		}
	}
	if flags < 10 {
		t.Errorf("found %d flags that take one of a few values, want at least 10", flags)
	}
}

// shellCompletes are programs that complete a command line with the script in $1 and print
// the candidates. They replace the functions that a shell has only at a terminal.
var shellCompletes = map[string]string{
	"bash": `compopt() { :; }
		_get_comp_words_by_ref() { cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} words=("${COMP_WORDS[@]}") cword=$COMP_CWORD; }
		source "$1"
		COMP_WORDS=(xapi-nbd $2 "") COMP_LINE="xapi-nbd $2 " COMP_TYPE=9
		COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMP_POINT=${#COMP_LINE}
		__start_xapi-nbd
		printf '%s\n' "${COMPREPLY[@]}"`,
	"zsh": `compdef() { : }
		_describe() { print -l -- $completions }
		source "$1"
		words=(xapi-nbd ${=2} "") CURRENT=$#words
		_xapi-nbd`,
	"fish": `source $argv[1]; complete -C "xapi-nbd $argv[2] "`,
}

// TestCompletionInShells: with the packaged scripts the shells offer the program's answers.
func TestCompletionInShells(t *testing.T) {
	dir := t.TempDir()
	if err := manpages.WriteCompletions(dir, newRootCommand()); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, filepath.Join(dir, "xapi-nbd")); err != nil {
		t.Fatal(err)
	}
	for shell, text := range shellCompletes {
		t.Run(shell, func(t *testing.T) {
			program := requires.Tool(t, shell)
			for typed, want := range map[string][]string{
				"--tls":               {"xapi", "require", "off"},
				"--log-level":         {"debug", "info", "warning", "error"},
				"check --log-format":  {"auto", "text", "json", "syslog"},
				"cleanup --log-level": {"debug", "info", "warning", "error"},
			} {
				args := []string{"-c", text, shell, filepath.Join(dir, "xapi-nbd."+shell), typed}
				if shell == "fish" {
					args = slices.Delete(args, 2, 3) // it has no $0
				}
				cmd := exec.Command(program, args...)
				cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), childEnv+"=1", "HOME="+dir)
				out, err := cmd.CombinedOutput()
				got := strings.Fields(string(out))
				slices.Sort(got)
				slices.Sort(want)
				if err != nil || !slices.Equal(got, want) {
					t.Errorf("%s: got %q (%v), want %q", typed, out, err, want)
				}
			}
		})
	}
}

// TestMistypedCommand: the error for an unknown command suggests a similar one.
func TestMistypedCommand(t *testing.T) {
	for typed, want := range map[string]string{
		"statsu": "did you mean status?", "chek": "did you mean check?", "nonsense": `unknown command "nonsense" for "xapi-nbd"` + "\n",
	} {
		var stdout, stderr bytes.Buffer
		if code := run(t.Context(), []string{typed}, &stdout, &stderr); code != exitUsage || !strings.Contains(stderr.String(), want) {
			t.Errorf("%s: got exit code %d and %q, want %q", typed, code, stderr.String(), want)
		}
	}
}
