package manpages

import (
	"os"
	"path/filepath"
	"strings"
)

// Setting is one key of a settings file.
type Setting struct {
	Key, Type string
	Default   string // as the file spells it; "" if there is none
	Flag      string // the flag of the same meaning, "" if there is none
	Text      string // a line that is indented by two blanks begins a line of the page too
}

// SettingsPage is a page of section 5.
type SettingsPage struct {
	Name     string // of the file, "xapi-nbd.toml"
	Summary  string
	Intro    string
	Settings []Setting
	Files    []File
	See      string // other pages, "xapi-nbd(8)"
	Edition  Edition
}

// File is a file that a page names, and its description.
type File struct{ Path, Text string }

// Write writes the page into dir, which it makes.
func (p SettingsPage) Write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, p.Name+".5"), []byte(p.roff()), 0o644)
}

func (p SettingsPage) roff() string {
	var w roff
	w.title(p.Name, "5", strings.TrimSuffix(p.Name, filepath.Ext(p.Name)), p.Edition)
	w.section("NAME")
	w.line(escape(p.Name) + ` \- ` + escape(p.Summary))
	w.section("DESCRIPTION")
	w.paragraphs(p.Intro)
	w.section("SETTINGS")
	for _, s := range p.Settings {
		w.line(".TP")
		w.line(".BR " + escape(s.Key) + ` " (` + escape(s.about()) + `)"`)
		for row := range strings.Lines(s.Text) {
			if rest, indented := strings.CutPrefix(row, "  "); indented && !strings.HasPrefix(rest, " ") {
				w.line(".br")
			}
			w.line(escape(strings.TrimSpace(row)))
		}
	}
	w.section("FILES")
	for _, f := range p.Files {
		w.item(`\fB`+escape(f.Path)+`\fR`, f.Text)
	}
	w.section("SEE ALSO")
	w.line(escape(p.See))
	return w.String()
}

// about returns the text about a key: its type, its default, its flag.
func (s Setting) about() string {
	parts := []string{s.Type}
	if s.Default != "" {
		parts = append(parts, "default "+s.Default)
	}
	if s.Flag != "" {
		parts = append(parts, "flag --"+s.Flag)
	}
	return strings.Join(parts, "; ")
}
