package documents

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// code has the identifiers that the module declares.
type code struct {
	tests    map[string]bool            // functions Test…, Fuzz…, Benchmark… and Example…
	packages map[string]map[string]bool // by the package's name: identifiers at package level
	types    map[string]map[string]bool // by the type's name: fields and methods
	names    map[string]bool            // all identifiers that are declared outside functions
	imports  map[string]bool            // last elements of imported paths of other modules
	methods  map[string]bool            // methods of the Xen API, such as VBD.plug
	files    []string                   // paths in the module, with slashes
	targets  map[string]bool            // of make
}

// TestNames: all tests, identifiers and files of this module and all targets of make that a
// document names exist.
func TestNames(t *testing.T) {
	c := readCode(t)
	if len(c.tests) < 300 || len(c.types) < 100 || len(c.methods) < 20 || len(c.targets) < 10 {
		t.Fatalf("found %d tests, %d types, %d methods of the Xen API, %d targets of make", len(c.tests), len(c.types), len(c.methods), len(c.targets))
	}
	checked := 0
	for path, text := range read(t, root) {
		for _, name := range testName.FindAllString(text, -1) {
			checked++
			if !c.hasTest(name) && !c.isRunPattern(name) {
				t.Errorf("%s: there is no test %s", path, name)
			}
		}
		for _, m := range makeTarget.FindAllStringSubmatch(text, -1) {
			checked++
			if !c.targets[m[1]] {
				t.Errorf("%s: there is no target %s of make", path, m[1])
			}
		}
		for _, m := range span.FindAllStringSubmatch(prose(text), -1) {
			for _, name := range testName.FindAllString(m[1], -1) {
				if !c.hasTest(name) {
					t.Errorf("%s: there is no test %s", path, name)
				}
			}
			for word := range strings.FieldsSeq(m[1]) {
				checked++
				if fault := c.check(word); fault != "" {
					t.Errorf("%s: `%s`: %s", path, m[1], fault)
				}
			}
		}
	}
	if checked < 500 {
		t.Errorf("checked %d names, want at least 500", checked)
	}
}

var (
	testName   = regexp.MustCompile(`\b(?:Test|Fuzz|Benchmark|Example)[A-Z]\w*…?`)
	makeTarget = regexp.MustCompile("(?m)(?:^    |`)make ([a-z][a-z-]*)")
	span       = regexp.MustCompile("`([^`]+)`")
	goFile     = regexp.MustCompile(`^[\w*./-]+\.(go|sh|txt|patch)$`)
	goPath     = regexp.MustCompile(`^[\w*.-]+(/[\w*.-]+)+/?$`)
	selector   = regexp.MustCompile(`^([A-Za-z]\w*)\.([A-Za-z]\w*)(?:\.([A-Za-z]\w*))?(?:\(\))?$`)
	camel      = regexp.MustCompile(`^(?:[a-z]+[A-Z][0-9A-Za-z]*|[A-Z][0-9A-Za-z]*[a-z][0-9A-Za-z]*)(?:\(\))?$`)
)

// foreign are words that look like identifiers of this module and belong to others.
var foreign = []string{
	"LimitNOFILE", "OpaqueRef", "WatchdogSec", "XenAPI", // systemd, xapi
	"VBD.device", "VDI.enable_cbt", // the Xen API
	"Packages",           // a folder of XenServer's installation medium
	"SetDeadline",        // package net
	"XapiNbdTextfileOld", // an alert
}

// hasTest reports whether there is a test of this name, or, where the name ends with …, of a
// name that begins with it.
func (c *code) hasTest(name string) bool {
	prefix, isPrefix := strings.CutSuffix(name, "…")
	for test := range c.tests {
		if test == prefix || isPrefix && strings.HasPrefix(test, prefix) {
			return true
		}
	}
	return false
}

// isRunPattern reports whether name is a group of tests, as commands name them with -run:
// the names of several tests are this one and further words.
func (c *code) isRunPattern(name string) bool {
	n := 0
	for test := range c.tests {
		if rest, ok := strings.CutPrefix(test, name); ok && rest != "" && strings.ToUpper(rest[:1]) == rest[:1] {
			n++
		}
	}
	return n > 1
}

// The test above notices names that do not exist.
func TestNamesThatDoNotExist(t *testing.T) {
	c := readCode(t)
	for _, word := range []string{
		"nbd.NoSuchFunction", "Limits.NoSuchField", "nbd.Limits.NoSuchField", "byteBudget.noSuchMethod", "noSuchName", "NoSuchName",
		"no_such_file.go", "nbd/no_such_file.go", "nbd/nosuchfolder", "nbd/testdata/no_such_*.txt", "VBD.no_such_method",
	} {
		if c.check(word) == "" {
			t.Errorf("%s does not exist and passes", word)
		}
	}
	for _, word := range []string{
		"nbd.Server", "Limits.MaxInflight", "nbd.Limits.MaxInflight", "Server", "net.Conn", "names_test.go", "nbd/wire", "nbd/wire/*.go",
		"VBD.plug", "OpaqueRef", "/usr/share/doc", "--watch", "max_vbds", "NBD_OPT_GO",
	} {
		if fault := c.check(word); fault != "" {
			t.Errorf("%s: %s", word, fault)
		}
	}
	if c.hasTest("TestNoSuchThing") || c.hasTest("TestNoSuch…") || !c.hasTest("TestNames") || !c.hasTest("TestName…") {
		t.Error("a test that does not exist passes, or one that does exist fails")
	}
}

// check describes the fault of a word of a code span, "" without a fault.
func (c *code) check(word string) string {
	word = strings.TrimRight(strings.TrimPrefix(word, "./"), ",;…")
	word = strings.TrimSuffix(word, "/")
	switch {
	case strings.HasPrefix(word, "/"), strings.HasPrefix(word, "-"), testName.MatchString(word), slices.Contains(foreign, word):
		return "" // a path on a host, a flag, a test
	case goFile.MatchString(word), goPath.MatchString(word) && c.isTop(word):
		if !c.hasFile(word) {
			return "there is no such file"
		}
	case selector.MatchString(word):
		return c.checkSelector(selector.FindStringSubmatch(word))
	case camel.MatchString(word):
		name := strings.TrimSuffix(word, "()")
		if !c.names[name] && c.packages[name] == nil {
			return "there is no such identifier"
		}
	}
	return ""
}

// checkSelector checks pkg.Name, Type.Member and pkg.Type.Member.
func (c *code) checkSelector(m []string) string {
	first, second, third := m[1], m[2], m[3]
	pkg, typ := c.packages[first], c.types[first]
	exported := ast.IsExported(second)
	switch {
	case typ[second], pkg[second] && (third == "" || c.types[second][third]):
		return ""
	case c.methods[first+"."+second] || c.imports[first]:
		return ""
	case xenMethod.MatchString(`"` + first + "." + second + `"`):
		return "the service and the simulated host have no such call of the Xen API"
	case typ != nil && (exported || pkg == nil), pkg != nil && exported:
		return "there is no such identifier"
	}
	return ""
}

// isTop reports whether the first element of a path is a file or folder of the module's root.
func (c *code) isTop(word string) bool {
	first, _, _ := strings.Cut(word, "/")
	return slices.ContainsFunc(c.files, func(f string) bool { return strings.HasPrefix(f, first+"/") })
}

// hasFile reports whether a file or folder matches the pattern. A pattern may leave out
// leading folders.
func (c *code) hasFile(pattern string) bool {
	depth := strings.Count(pattern, "/") + 1
	for _, file := range c.files {
		elements := strings.Split(file, "/")
		for end := depth; end <= len(elements); end++ {
			if ok, _ := path.Match(pattern, strings.Join(elements[end-depth:end], "/")); ok {
				return true
			}
		}
	}
	return false
}

// readCode parses the module.
func readCode(t *testing.T) *code {
	t.Helper()
	c := &code{
		tests: make(map[string]bool), packages: make(map[string]map[string]bool), types: make(map[string]map[string]bool),
		names: make(map[string]bool), imports: make(map[string]bool), methods: make(map[string]bool), targets: make(map[string]bool),
	}
	err := filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if slices.Contains([]string{".git", "bin"}, d.Name()) {
				return filepath.SkipDir
			}
			return nil
		}
		relative, err := filepath.Rel(root, file)
		if err != nil {
			return err
		}
		c.files = append(c.files, filepath.ToSlash(relative))
		if filepath.Ext(file) == ".go" {
			return c.add(file)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	makefile, err := os.ReadFile(filepath.Join(root, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`(?m)^([a-z][a-z-]*):`).FindAllStringSubmatch(string(makefile), -1) {
		c.targets[m[1]] = true
	}
	return c
}

// xenMethod matches the names of methods of the Xen API in string literals.
var xenMethod = regexp.MustCompile(`^"((?:VBD|VDI|VM|SR|PBD|host|network|pool|session|task|event)\.\w+)"$`)

// add adds the declarations of a file.
func (c *code) add(path string) error {
	file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
	if err != nil {
		return err
	}
	pkg := strings.TrimSuffix(file.Name.Name, "_test")
	for _, spec := range file.Imports {
		if name := strings.Trim(spec.Path.Value, `"`); !strings.HasPrefix(name, "xapi-nbd/") {
			c.imports[name[strings.LastIndex(name, "/")+1:]] = true
		}
	}
	declare := func(name string) {
		enter(c.packages, pkg, name)
		c.names[name] = true
	}
	for _, decl := range file.Decls {
		switch d := decl.(type) {
		case *ast.FuncDecl:
			c.addFunc(d, declare)
		case *ast.GenDecl:
			for _, spec := range d.Specs {
				switch s := spec.(type) {
				case *ast.TypeSpec:
					declare(s.Name.Name)
					c.addMembers(s)
				case *ast.ValueSpec:
					for _, name := range s.Names {
						declare(name.Name)
					}
				}
			}
		}
	}
	ast.Inspect(file, func(n ast.Node) bool {
		if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING && !strings.HasSuffix(path, "_test.go") {
			if m := xenMethod.FindStringSubmatch(lit.Value); m != nil {
				c.methods[m[1]] = true
			}
		}
		return true
	})
	return nil
}

// addFunc adds a function or method.
func (c *code) addFunc(d *ast.FuncDecl, declare func(name string)) {
	if d.Recv == nil {
		if testName.MatchString(d.Name.Name) {
			c.tests[d.Name.Name] = true
		}
		declare(d.Name.Name)
		return
	}
	c.names[d.Name.Name] = true
	typ := d.Recv.List[0].Type
	for {
		switch x := typ.(type) {
		case *ast.StarExpr:
			typ = x.X
			continue
		case *ast.IndexExpr:
			typ = x.X
			continue
		case *ast.Ident:
			enter(c.types, x.Name, d.Name.Name)
		}
		return
	}
}

// addMembers adds the fields of a struct, or the methods of an interface.
func (c *code) addMembers(s *ast.TypeSpec) {
	enter(c.types, s.Name.Name, "")
	ast.Inspect(s.Type, func(n ast.Node) bool {
		if field, ok := n.(*ast.Field); ok {
			for _, name := range field.Names {
				enter(c.types, s.Name.Name, name.Name)
				c.names[name.Name] = true
			}
		}
		return true
	})
}

func enter(m map[string]map[string]bool, key, name string) {
	if m[key] == nil {
		m[key] = make(map[string]bool)
	}
	m[key][name] = true
}
