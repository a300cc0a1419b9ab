package main

import (
	"bytes"
	"strings"
	"testing"

	"xapi-nbd/cmd/internal/buildinfo"
)

func TestCommandLine(t *testing.T) {
	tests := []struct {
		name   string
		args   []string
		code   int
		stdout string
		stderr string
	}{
		{"version", []string{"version"}, 0, "xapi-nbd ", ""},
		{"version flag", []string{"--version"}, 0, "xapi-nbd " + buildinfo.Version() + "\n", ""},
		{"help", []string{"--help"}, 0, "--certfile PEM", ""},
		{"help of demo", []string{"demo", "--help"}, 0, "--once", ""},
		{"unknown flag", []string{"--nonsense"}, exitUsage, "", "unknown flag: --nonsense"},
		{"unknown command", []string{"nonsense"}, exitUsage, "", "nonsense"},
		{"unknown configuration file", []string{"--config=/nonexistent"}, exitUsage, "", "/nonexistent"},
		{"bad setting", []string{"serve", "--port=-1"}, exitUsage, "", "port must be 0 to 65535"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			if code := run(t.Context(), tt.args, &stdout, &stderr); code != tt.code {
				t.Errorf("exit code: got %d, want %d", code, tt.code)
			}
			if !strings.Contains(stdout.String(), tt.stdout) || !strings.Contains(stderr.String(), tt.stderr) {
				t.Errorf("got %q and %q, want them to contain %q and %q", stdout.String(), stderr.String(), tt.stdout, tt.stderr)
			}
		})
	}
}
