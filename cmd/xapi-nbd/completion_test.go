package main

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"xapi-nbd/cmd/internal/manpages"
	"xapi-nbd/test/requires"
)

// Each shell can read the script that is made for it.
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

// What the scripts ask the program, it answers.
func TestCompletion(t *testing.T) {
	tests := []struct {
		name string
		args []string
		want []string
	}{
		{"commands", []string{""}, []string{"serve", "cleanup", "version"}},
		{"beginning of a command", []string{"cle"}, []string{"cleanup"}},
		{"flags of no command", []string{"--cert"}, []string{"--certfile"}},
		{"values of --tls", []string{"--tls", ""}, []string{"xapi", "require", "off"}},
		{"values of --log-level", []string{"serve", "--log-level", "w"}, []string{"warning"}},
		{"values of --log-format", []string{"--log-format", ""}, []string{"json", "syslog"}},
		{"flags of a command", []string{"cleanup", "--state"}, []string{"--state-dir"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			if code := run(t.Context(), append([]string{"__complete"}, tt.args...), &stdout, &stderr); code != 0 {
				t.Fatalf("got exit code %d, want 0: %s", code, stderr.String())
			}
			for _, want := range tt.want {
				if !strings.Contains("\n"+stdout.String(), "\n"+want) {
					t.Errorf("got %q, want a line with %s", stdout.String(), want)
				}
			}
		})
	}
}

// A mistyped command is answered with the one that was meant.
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
