package vm

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// In the output for test2json a test binary puts a control character before each of its
// own lines.
func TestConvert(t *testing.T) {
	printed := strings.Join([]string{
		"@=== RUN   TestXen", "@=== RUN   TestXen/good", "    x_test.go:1: peer: Xen 4.17", "@=== RUN   TestXen/bad", "    x_test.go:2: wrong",
		"@=== NAME  TestXen", "@--- FAIL: TestXen (0.00s)", "@    --- PASS: TestXen/good (0.00s)", "@    --- FAIL: TestXen/bad (0.00s)",
		"@=== RUN   TestXen/cut", "panic: in the middle", "",
	}, "\n")
	got := convert(t, []byte(strings.ReplaceAll(printed, "@", "\x16")))
	if diff := cmp.Diff([]string{"TestXen", "TestXen/good", "TestXen/bad", "TestXen/cut"}, got.order); diff != "" {
		t.Error("order:", diff)
	}
	want := map[string]string{"TestXen": "fail", "TestXen/good": "pass", "TestXen/bad": "fail"}
	for name := range map[string]bool{"TestXen": true, "TestXen/good": true, "TestXen/bad": true, "TestXen/cut": true} {
		if got.ended[name] != want[name] {
			t.Errorf("%s: got %q, want %q", name, got.ended[name], want[name])
		}
	}
	if text := strings.Join(got.output["TestXen/good"], ""); !strings.Contains(text, "peer: Xen 4.17") {
		t.Errorf("output of TestXen/good: got %q, want the peer's line in it", text)
	}
}

// TestNoStatus: a guest that did not boot is reported as such, for any cause.
func TestNoStatus(t *testing.T) {
	tests := []struct {
		name string
		args []string
	}{
		{"no kind", nil},
		{"unknown kind", []string{"windows", "true"}},
		{"unknown option", []string{"linux", "-x", "true"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := exitCode(t, append([]string{"boot.sh"}, tt.args...)...); got != noStatus {
				t.Errorf("got exit status %d, want %d", got, noStatus)
			}
		})
	}
	t.Run("no tools", func(t *testing.T) {
		t.Setenv("VM_CACHE", t.TempDir())
		t.Setenv("PATH", withoutQEMU(t))
		if got := exitCode(t, "boot.sh", "linux", "true"); got != noStatus {
			t.Errorf("got exit status %d, want %d", got, noStatus)
		}
	})
}

func exitCode(t *testing.T, args ...string) int {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/bin/bash", args...)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		t.Fatal(err)
	}
	t.Logf("%q printed:\n%s", args, out)
	return cmd.ProcessState.ExitCode()
}

// withoutQEMU is a PATH with the programs that the scripts need to find missing ones.
func withoutQEMU(t *testing.T) string {
	t.Helper()
	dirname, err := exec.LookPath("dirname")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.Symlink(dirname, filepath.Join(dir, "dirname")); err != nil {
		t.Fatal(err)
	}
	return dir
}
