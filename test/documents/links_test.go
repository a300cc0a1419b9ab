// Package documents tests the project's documents: that their links lead somewhere, and
// that the tests, identifiers and files that they name exist.
package documents

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"
)

// root is the folder of the module.
const root = "../.."

// read returns the documents below dir by their paths.
func read(t *testing.T, dir string) map[string]string {
	t.Helper()
	documents := make(map[string]string)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && slices.Contains([]string{".git", "bin", "testdata"}, d.Name()) {
			return filepath.SkipDir
		}
		if filepath.Ext(path) != ".md" {
			return nil
		}
		text, err := os.ReadFile(path)
		documents[path] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return documents
}

// Links lead to files that exist, and to headings of them.
func TestLinks(t *testing.T) {
	documents := read(t, root)
	if len(documents) < 12 {
		t.Errorf("found %d documents, want at least 12", len(documents))
	}
	checkLinks(t, documents)
}

// The same holds for the documents as packages install them, in other folders.
func TestInstalledLinks(t *testing.T) {
	dir := t.TempDir()
	if out, err := exec.CommandContext(t.Context(), "/bin/sh", filepath.Join(root, "packaging/documents.sh"), dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	documents := read(t, dir)
	if got, want := len(documents), len(read(t, filepath.Join(root, "docs")))+3; got != want {
		t.Errorf("%d documents are installed, want %d", got, want)
	}
	checkLinks(t, documents)
}

// named matches the name of a document of this project in code: in capitals, or below docs.
var named = regexp.MustCompile(`(?:docs/[\w/-]+|\b[A-Z]{5,})\.md\b`)

// Documents that code, scripts and messages name exist, and sections that they name too.
func TestNamedDocuments(t *testing.T) {
	section := regexp.MustCompile(`docs/([\w/-]+\.md),?\s+(?://\s+)?"([^"]+)"`)
	found := 0
	for _, path := range readCode(t).files {
		if !slices.Contains([]string{".go", ".sh", ".toml", ".spec", ".8", ".yml"}, filepath.Ext(path)) && filepath.Base(path) != "Makefile" {
			continue
		}
		text := readFile(t, path)
		for _, name := range named.FindAllString(text, -1) {
			found++
			if !slices.ContainsFunc([]string{"", "docs", "docs/results"}, func(dir string) bool {
				_, err := os.Stat(filepath.Join(root, dir, name))
				return err == nil
			}) {
				t.Errorf("%s names %s, which does not exist", path, name)
			}
		}
		for _, m := range section.FindAllStringSubmatch(text, -1) {
			if heading := regexp.MustCompile(`(?m)^#+ ` + regexp.QuoteMeta(m[2]) + `$`); !heading.MatchString(readFile(t, "docs/"+m[1])) {
				t.Errorf("%s: %s has no section %q", path, m[1], m[2])
			}
		}
	}
	if found < 20 {
		t.Errorf("found %d names of documents in code, want at least 20", found)
	}
}

// link matches the target of a link.
var link = regexp.MustCompile(`\]\(([^)\s]+)\)`)

func checkLinks(t *testing.T, documents map[string]string) {
	t.Helper()
	for path, text := range documents {
		for _, m := range link.FindAllStringSubmatch(prose(text), -1) {
			if strings.HasPrefix(m[1], "https://") {
				continue
			}
			target, anchor, _ := strings.Cut(m[1], "#")
			file := path
			if target != "" {
				file = filepath.Join(filepath.Dir(path), target)
			}
			if _, err := os.Stat(file); err != nil {
				t.Errorf("%s: the link %s leads nowhere", path, m[1])
			} else if anchor != "" && !slices.Contains(anchors(documents[file]), anchor) {
				t.Errorf("%s: the link %s leads to no heading", path, m[1])
			}
		}
	}
}

// prose returns a document without its code blocks.
func prose(text string) string {
	var b strings.Builder
	fenced := false
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "```") {
			fenced = !fenced
			continue
		}
		if !fenced && !strings.HasPrefix(line, "    ") {
			b.WriteString(line)
		}
	}
	return b.String()
}

// anchors returns the names that headings have in links.
func anchors(text string) []string {
	var names []string
	for line := range strings.Lines(prose(text)) {
		title, isHeading := strings.CutPrefix(strings.TrimLeft(line, "#"), " ")
		if !isHeading || !strings.HasPrefix(line, "#") {
			continue
		}
		names = append(names, strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case r == '-' || r == '_' || unicode.IsLetter(r) || unicode.IsDigit(r):
				return unicode.ToLower(r)
			}
			return -1
		}, strings.TrimSpace(title)))
	}
	return names
}
