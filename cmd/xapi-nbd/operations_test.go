package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"xapi-nbd/auth"
	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/cmd/xapi-nbd/internal/control"
	"xapi-nbd/vdi"
)

// docs/OPERATIONS.md explains every setting, docs/REFERENCE.md every exit code, refusal, log
// line, metric and field of status. These tests compare both with the code.

// operations returns the text of docs/OPERATIONS.md.
func operations(t *testing.T) string {
	t.Helper()
	return document(t, "OPERATIONS.md")
}

// reference returns the text of docs/REFERENCE.md.
func reference(t *testing.T) string {
	t.Helper()
	return document(t, "REFERENCE.md")
}

// document returns the text of a file in docs.
func document(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile("../../docs/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestOperationsFitsAnInstalledHost: readers of the installed documents have no source tree.
// The documents name no file of packaging/ without the path where it is installed, and no
// command for installing that a real host refuses.
func TestOperationsFitsAnInstalledHost(t *testing.T) {
	stage, err := os.ReadFile("../../packaging/stage.sh")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"OPERATIONS.md", "REFERENCE.md", "MIGRATING.md", "SECURITY.md"} {
		text := document(t, name)
		// Commands stand in lines that are indented by four blanks or more.
		for line := range strings.Lines(text) {
			if !strings.HasPrefix(line, "    ") {
				line = ""
			}
			if uselessOnHost.MatchString(line) {
				t.Errorf("%s: %q is refused by a host that has the original, or by xcp-ng-deps", name, line)
			}
		}
		if strings.Contains(text, "packaging/") {
			t.Errorf("%s names packaging/, which is not on a host", name)
		}
		for _, m := range regexp.MustCompile(`/usr/share/doc/xapi-nbd/([^\s`+"`"+`)]+)`).FindAllStringSubmatch(text, -1) {
			if !strings.Contains(string(stage), `"$doc/`+m[1]+`"`) {
				t.Errorf("%s: the packages do not install %s", name, m[0])
			}
		}
	}
}

// uselessOnHost are commands that install the package beside the original, or remove it while
// other packages require it. Both fail; -U, and --nodeps, do not.
var uselessOnHost = regexp.MustCompile(`\b(rpm\s+(-i|--install)|rpm\s+(-e|--erase)\s+xapi-nbd|yum\s+(remove|erase)\s+xapi-nbd)`)

// TestOperationsNamesEveryStatusField: every field of status --json is explained.
func TestOperationsNamesEveryStatusField(t *testing.T) {
	text := reference(t)
	fields := make(map[string]bool)
	addFields(fields, "", reflect.TypeFor[control.StatusReport]())
	for field := range fields {
		if !strings.Contains(text, "`"+field+"`") {
			t.Errorf("the field %s is not explained", field)
		}
	}
	for _, m := range regexp.MustCompile("`((?:limits|xapi|attachments\\[\\]|leftovers\\[\\]|connections\\[\\]|retries\\[\\])\\.[a-z_]+)`").FindAllStringSubmatch(text, -1) {
		if !fields[m[1]] {
			t.Errorf("%s is explained, and there is no such field", m[1])
		}
	}
}

// addFields adds the JSON paths of a report.
func addFields(fields map[string]bool, path string, typ reflect.Type) {
	for i := range typ.NumField() {
		f := typ.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		name = path + name
		switch kind := f.Type.Kind(); {
		case f.Type == reflect.TypeFor[[]control.StatusReport](): // has the same fields again
			fields[name+"[]"] = true
		case kind == reflect.Struct && f.Type != reflect.TypeFor[time.Time]():
			addFields(fields, name+".", f.Type)
		case kind == reflect.Slice && f.Type.Elem().Kind() == reflect.Struct:
			addFields(fields, name+"[].", f.Type.Elem())
		case kind == reflect.Map:
			fields[name+".…"] = true
		case name == "journal":
			fields[name+"[]"] = true
		default:
			fields[name] = true
		}
	}
}

func TestOperationsNamesEverySetting(t *testing.T) {
	text := operations(t)
	settings := reflect.TypeFor[config.Config]()
	for i := range settings.NumField() {
		key := settings.Field(i).Tag.Get("toml")
		if key != "" && !strings.Contains(text, "| `"+key+"` |") {
			t.Errorf("there is no row about the key %s", key)
		}
	}
}

// TestOperationsNamesEveryFinding: every finding of check has a row, and every row a finding.
func TestOperationsNamesEveryFinding(t *testing.T) {
	rows := strings.Split(strings.TrimSpace(table(t, operations(t), "Check")), "\n")
	found := make(map[string]bool)
	note := func(what string) {
		if what != "" && !found[what] {
			found[what] = true
			if !slices.Contains(rows, what) {
				t.Errorf("there is no row about the finding %s", what)
			}
		}
	}
	for _, dir := range serviceFolders(t) {
		findings := 0
		eachCall(t, dir, func(call *ast.CallExpr, receiver, method string) {
			if receiver == "c" && slices.Contains([]string{"ok", "warning", "problem"}, method) && len(call.Args) > 1 {
				findings++
				note(literal(call.Args[0]))
			}
		})
		if findings == 0 {
			continue
		}
		// Functions with several findings about one subject have a constant for its name.
		for _, file := range sources(t, dir) {
			ast.Inspect(file, func(n ast.Node) bool {
				if spec, ok := n.(*ast.ValueSpec); ok && spec.Names[0].Name == "subject" && len(spec.Values) == 1 {
					note(literal(spec.Values[0]))
				}
				return true
			})
		}
	}
	for _, row := range rows[1:] { // behind the head
		if !found[row] {
			t.Errorf("there is a row about %s, and no such finding", row)
		}
	}
}

func TestOperationsNamesEveryExitCode(t *testing.T) {
	text := reference(t)
	codes := 0
	eachExitCode(t, func(name, code string) {
		codes++
		if !strings.Contains(text, "\n| "+code+" |") {
			t.Errorf("there is no row about exit code %s (%s)", code, name)
		}
	})
	if codes < 5 {
		t.Errorf("found %d exit codes in the code, want at least 5", codes)
	}
}

// TestOperationsNamesEveryLogLine: every line of level info and above has a row. Debug lines
// are for programmers.
func TestOperationsNamesEveryLogLine(t *testing.T) {
	text := table(t, reference(t), "Log lines")
	levels := []string{"Info", "Warn", "Error", "InfoContext", "WarnContext", "ErrorContext"}
	lines := 0
	for _, dir := range serviceFolders(t) {
		eachCall(t, dir, func(call *ast.CallExpr, receiver, method string) {
			bounded := method == "logBounded"
			if !bounded && (!slices.Contains(levels, method) || !slices.Contains([]string{"log", "Logger", "logger", "always"}, receiver)) {
				return
			}
			message := call.Args[0]
			switch {
			case bounded:
				message = call.Args[2]
			case strings.HasSuffix(method, "Context"):
				message = call.Args[1]
			}
			if line := literal(message); line != "" {
				lines++
				wantInText(t, text, "log line", dir, line)
			}
		})
	}
	wantInText(t, text, "log line", "package nbd", "export refused`, `option refused`")
	if lines < 30 {
		t.Errorf("found %d log lines in the code, want at least 30", lines)
	}
}

func TestOperationsNamesEveryRefusal(t *testing.T) {
	text := reference(t)
	refusals := 0
	for _, dir := range serviceFolders(t) {
		eachCall(t, dir, func(call *ast.CallExpr, _, method string) {
			at := map[string]int{"Refuse": 1, "refuse": 2, "malformed": 0}
			i, ok := at[method]
			if !ok || len(call.Args) <= i {
				return
			}
			if refusal := literal(call.Args[i]); refusal != "" {
				refusals++
				wantInText(t, text, "refusal", dir, strings.ReplaceAll(strings.TrimSuffix(refusal, "%d bytes"), "%%", "%"))
			}
		})
	}
	eachDenialText(t, func(refusal string) {
		refusals++
		wantInText(t, text, "refusal", "package nbd", refusal)
	})
	if refusals < 20 {
		t.Errorf("found %d refusals in the code, want at least 20", refusals)
	}
	limit, _, _ := strings.Cut((&vdi.LimitError{}).Error(), "0")
	size, _, _ := strings.Cut((&vdi.SizeError{Virtual: 1}).Error(), "it has")
	unknownSize, _, _ := strings.Cut((&vdi.SizeError{}).Error(), ",")
	for _, refusal := range []string{
		limit, size, unknownSize, auth.ErrSession.Error(), auth.ErrTooManyRejections.Error(),
		auth.ErrNoPurpose.Error(), auth.ErrConflictingPurpose.Error(),
		vdi.ErrStillAttaching.Error(), vdi.ErrLost.Error(), vdi.ErrJournalLocked.Error(), "connection limit reached: max_connections is",
		"send NBD_OPT_STARTTLS first", "the VDI cannot be plugged: ", "the export cannot be opened",
	} {
		wantInText(t, text, "refusal", "the service", refusal)
	}
}

// eachDenialText calls visit for the texts of package nbd's own refusals.
func eachDenialText(t *testing.T, visit func(text string)) {
	t.Helper()
	for _, file := range sources(t, "../../nbd") {
		ast.Inspect(file, func(n ast.Node) bool {
			lit, ok := n.(*ast.CompositeLit)
			if !ok {
				return true
			}
			if typ, ok := lit.Type.(*ast.Ident); !ok || typ.Name != "denial" {
				return true
			}
			for _, field := range lit.Elts {
				kv, ok := field.(*ast.KeyValueExpr)
				if !ok {
					continue
				}
				if key, ok := kv.Key.(*ast.Ident); ok && key.Name == "text" {
					if text := literal(kv.Value); text != "" {
						visit(text)
					}
				}
			}
			return true
		})
	}
}

// TestOperationsNamesEveryEnd: the reasons of "transmission ended" and "handshake ended without
// an export" have rows.
func TestOperationsNamesEveryEnd(t *testing.T) {
	text := table(t, reference(t), "How connections end")
	ends := 0
	eachCall(t, "../../nbd", func(call *ast.CallExpr, _, method string) {
		if method != "hardDisconnect" {
			return
		}
		end := literal(call.Args[0])
		if end == "within" { // behind a variable
			end = "idle: no request within` a time"
		}
		if end != "" {
			ends++
			wantInText(t, text, "end of a connection", "package nbd", end)
		}
	})
	if ends < 10 {
		t.Errorf("found %d ends of connections in the code, want at least 10", ends)
	}
}

// wantInText fails the test unless a code span of the text begins with line.
func wantInText(t *testing.T, text, what, where, line string) {
	t.Helper()
	// Line breaks of the document do not matter.
	if !strings.Contains(strings.Join(strings.Fields(text), " "), "`"+strings.TrimSpace(line)) {
		t.Errorf("%s of %s: %q is not explained", what, where, line)
	}
}

// table returns the first cells of the rows of the table below a heading.
func table(t *testing.T, text, heading string) string {
	t.Helper()
	_, section, found := strings.Cut(text, "\n## "+heading+"\n")
	if !found {
		t.Fatalf("there is no section %s", heading)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	var cells strings.Builder
	for line := range strings.Lines(section) {
		if row, ok := strings.CutPrefix(line, "| "); ok {
			cell, _, _ := strings.Cut(row, " | ")
			cells.WriteString(cell + "\n")
		}
	}
	return cells.String()
}

// serviceFolders are those of the packages that a service consists of.
func serviceFolders(t *testing.T) (dirs []string) {
	t.Helper()
	const root = "../.."
	for _, top := range []string{"auth", "cmd/xapi-nbd", "internal", "nbd", "tls", "vdi", "xapi"} {
		err := filepath.WalkDir(filepath.Join(root, top), func(path string, d fs.DirEntry, err error) error {
			switch {
			case err != nil:
				return err
			case !d.IsDir():
				return nil
			// Packages for tests, other programs, and data.
			case slices.Contains([]string{"nbdtest", "nbdfile", "xapitest", "testdata"}, d.Name()):
				return filepath.SkipDir
			}
			dirs = append(dirs, path)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return dirs
}

// sources parses the files of a package, without tests.
func sources(t *testing.T, dir string) (files []*ast.File) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, file)
	}
	return files
}

// eachCall calls visit for every call of a function or method; receiver is the
// last name before the method's.
func eachCall(t *testing.T, dir string, visit func(call *ast.CallExpr, receiver, method string)) {
	t.Helper()
	for _, file := range sources(t, dir) {
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			switch f := call.Fun.(type) {
			case *ast.Ident:
				visit(call, "", f.Name)
			case *ast.SelectorExpr:
				receiver := ""
				switch x := f.X.(type) {
				case *ast.Ident:
					receiver = x.Name
				case *ast.SelectorExpr:
					receiver = x.Sel.Name
				}
				visit(call, receiver, f.Sel.Name)
			}
			return true
		})
	}
}

// literal is the text of a string literal, or of the first one of a sum; "" of
// everything else.
func literal(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.BasicLit:
		text, err := strconv.Unquote(e.Value)
		if err != nil {
			return ""
		}
		return strings.TrimSpace(text)
	case *ast.BinaryExpr:
		if text := literal(e.X); text != "" {
			return text
		}
		return literal(e.Y)
	}
	return ""
}
