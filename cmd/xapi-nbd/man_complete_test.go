package main

import (
	"go/ast"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/cmd/xapi-nbd/internal/control"
)

// TestManPagesAreComplete: xapi-nbd(8) and xapi-nbd-serve(8) name every exit code of the
// program, or of the service, every signal that it catches and every file that it uses.
func TestManPagesAreComplete(t *testing.T) {
	dir := t.TempDir()
	if err := manual(t).Write(dir); err != nil {
		t.Fatal(err)
	}
	files := []string{config.DefaultFile, "/VBDs_to_clean_up", "/VBD_creates_pending", "/lock", "/" + control.SocketName, "/var/run/nonpersistent/nbd"}
	files = append(append(files, config.Default().Inventory, config.Default().StateDir), config.XapiSockets...)
	for _, p := range []struct {
		name  string
		codes []string
	}{{"xapi-nbd.8", exitCodesInCode(t)}, {"xapi-nbd-serve.8", []string{"0", "2", "3", "4", "5"}}} {
		text, err := os.ReadFile(filepath.Join(dir, p.name))
		if err != nil {
			t.Fatal(err)
		}
		status := manSection(t, string(text), "EXIT STATUS")
		var got []string
		for _, m := range regexp.MustCompile(`(?m)^\\fB(\w+)\\fR$`).FindAllStringSubmatch(status, -1) {
			got = append(got, m[1])
		}
		if !slices.Equal(got, p.codes) {
			t.Errorf("%s: got exit codes %q, want %q", p.name, got, p.codes)
		}
		if left := regexp.MustCompile(`(?m)^\\fB5\\fR\n.*VBDs are left.*VBD\.create was not answered`); !left.MatchString(status) {
			t.Errorf("%s: exit code 5 does not name both kinds of VBDs:\n%s", p.name, status)
		}
		for _, signal := range signalsInCode(t) {
			if !strings.Contains(manSection(t, string(text), "SIGNALS"), signal) {
				t.Errorf("%s: SIGNALS lacks %s", p.name, signal)
			}
		}
		for _, file := range files {
			if !strings.Contains(manSection(t, string(text), "FILES"), file) {
				t.Errorf("%s: FILES lacks %s", p.name, file)
			}
		}
	}
}

// exitCodesInCode returns the exit codes that the program's code names, and 0.
func exitCodesInCode(t *testing.T) []string {
	t.Helper()
	codes := []string{"0"}
	eachExitCode(t, func(_, code string) { codes = append(codes, code) })
	slices.Sort(codes)
	return slices.Compact(codes)
}

// eachExitCode calls visit for the constants of exit codes.
func eachExitCode(t *testing.T, visit func(name, code string)) {
	t.Helper()
	for _, file := range sources(t, ".") {
		ast.Inspect(file, func(n ast.Node) bool {
			spec, ok := n.(*ast.ValueSpec)
			if !ok || len(spec.Values) != 1 || !strings.HasPrefix(spec.Names[0].Name, "exit") {
				return true
			}
			if code, ok := spec.Values[0].(*ast.BasicLit); ok && code.Kind == token.INT {
				visit(spec.Names[0].Name, code.Value)
			}
			return true
		})
	}
}

// signalsInCode returns the signals that the program's code names.
func signalsInCode(t *testing.T) []string {
	t.Helper()
	var names []string
	for _, file := range sources(t, ".") {
		ast.Inspect(file, func(n ast.Node) bool {
			if s, ok := n.(*ast.SelectorExpr); ok && strings.HasPrefix(s.Sel.Name, "SIG") {
				names = append(names, s.Sel.Name)
			}
			return true
		})
	}
	slices.Sort(names)
	if names = slices.Compact(names); len(names) < 5 {
		t.Errorf("found the signals %q in the code, want at least 5", names)
	}
	return names
}
