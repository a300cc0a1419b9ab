package main

import (
	"strings"
	"testing"
)

func TestHelp(t *testing.T) {
	for _, args := range [][]string{{"--help"}, {"help"}, {"copy", "--help"}, {"list", "-h"}, {"help", "map"}} {
		if got := succeed(t, args...); !strings.Contains(got, "Usage:\n  nbd-tool") {
			t.Errorf("%q: got %q", args, got)
		}
	}
	if got := succeed(t, "--help"); !strings.Contains(got, exitCodesHelp) {
		t.Error("the help does not explain the exit codes")
	}
	for _, arg := range []string{"version", "--version"} {
		if got := succeed(t, arg); !strings.HasPrefix(got, "nbd-tool ") || strings.Count(got, "\n") != 1 {
			t.Errorf("%s: got %q", arg, got)
		}
	}
}

func TestUsageErrors(t *testing.T) {
	tests := []struct {
		name string
		args []string
		want string
	}{
		{"nothing", nil, "which command"},
		{"unknown command", []string{"move", "a", "b"}, `unknown command "move"`},
		{"mistyped command", []string{"coppy", "a", "b"}, `unknown command "coppy"; is it copy?`},
		{"URI without a command", []string{"nbd://h/disk"}, `unknown command "nbd://h/disk"` + "\n"},
		{"unknown flag", []string{"list", "--fast", "nbd://h"}, "--fast"},
		{"value of a flag", []string{"copy", "--requests=many", "a", "b"}, "many"},
		{"two URIs", []string{"info", "nbd://h", "nbd://h"}, "want one URI"},
		{"no URI", []string{"info", "disk.img"}, "not an NBD URI"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { fail(t, exitUsage, []string{tt.want, "--help"}, tt.args...) })
	}
}

func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if got := succeed(t, "completion", shell); !strings.Contains(got, "nbd-tool") {
			t.Errorf("%s: got %d bytes", shell, len(got))
		}
	}
	r := tool(t, "__complete", "")
	for _, command := range []string{"list", "info", "size", "map", "copy", "serve", "mirror", "ctl"} {
		if !strings.Contains(r.out, command+"\t") {
			t.Errorf("%s is not completed:\n%s", command, r.out)
		}
	}
	if r := tool(t, "__complete", "copy", "--conn"); !strings.Contains(r.out, "--connections") {
		t.Errorf("flags are not completed: %+v", r)
	}
}
