package manpages

import (
	"fmt"
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
	Files    []string
	See      string // other pages, "xapi-nbd(8)"
}

// Write writes the page into dir, which it makes. The date is that of all pages.
func (p SettingsPage) Write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, p.Name+".5"), []byte(p.roff()), 0o644)
}

func (p SettingsPage) roff() string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line(`.TH "%s" "5" "Jan 1970" "%s" "NBD"`, strings.ToUpper(p.Name), strings.TrimSuffix(p.Name, filepath.Ext(p.Name)))
	line(".SH NAME\n%s \\- %s", quote(p.Name), quote(p.Summary))
	line(".SH DESCRIPTION\n%s", quote(p.Intro))
	line(".SH SETTINGS")
	for _, s := range p.Settings {
		line(".TP\n.BR %s \" (%s)\"", quote(s.Key), quote(s.about()))
		for row := range strings.Lines(s.Text) {
			if rest, indented := strings.CutPrefix(row, "  "); indented && !strings.HasPrefix(rest, " ") {
				line(".br")
			}
			line("%s", quote(strings.TrimSpace(row)))
		}
	}
	line(".SH FILES")
	line("%s", quote(strings.Join(p.Files, ", ")))
	line(".SH SEE ALSO\n%s", quote(p.See))
	return b.String()
}

// about is what stands behind a key: its type, its default, its flag.
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

// quote protects what roff would understand as its own.
func quote(text string) string {
	text = strings.NewReplacer(`\`, `\e`, "-", `\-`, `"`, `\(dq`, "'", `\(aq`).Replace(text)
	if strings.HasPrefix(text, ".") {
		text = `\&` + text
	}
	return text
}
