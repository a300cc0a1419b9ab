package manpages

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Book is the man pages of one program.
type Book struct {
	Root    *cobra.Command
	Section string // of the manual: "1" or "8"
	Edition Edition
	See     []string // pages of other sections that each page names, "xapi-nbd.toml(5)"
	// More returns text that the page of a command has and its help has not, in
	// the form of Long; nil stands for none.
	More func(cmd *cobra.Command) string
}

// Edition is the text at the foot of every page.
type Edition struct {
	Version string    // of the program
	Date    time.Time // printed as a day in UTC
}

// CurrentEdition reads the version from versionFile, and the date from
// SOURCE_DATE_EPOCH, the number of seconds since 1970 that packages carry (see
// packaging/epoch.sh), so that the same sources give the same pages. Without it
// the date is that of versionFile, but pages that MAN_DIR asks for are not made:
// they would carry a wrong date.
func CurrentEdition(versionFile string) (Edition, error) {
	text, err := os.ReadFile(versionFile)
	if err != nil {
		return Edition{}, err
	}
	e := Edition{Version: strings.TrimSpace(string(text))}
	epoch := os.Getenv("SOURCE_DATE_EPOCH")
	if epoch == "" {
		if os.Getenv("MAN_DIR") != "" {
			return Edition{}, errors.New("MAN_DIR needs SOURCE_DATE_EPOCH, see packaging/man.sh")
		}
		info, err := os.Stat(versionFile)
		if err != nil {
			return Edition{}, err
		}
		e.Date = info.ModTime()
		return e, nil
	}
	seconds, err := strconv.ParseInt(epoch, 10, 64)
	if err != nil {
		return Edition{}, fmt.Errorf("SOURCE_DATE_EPOCH: want seconds since 1970, got %q", epoch)
	}
	e.Date = time.Unix(seconds, 0)
	return e, nil
}

// Dir is where a test leaves its pages: the folder that MAN_DIR names, else the
// given one.
func Dir(otherwise string) string {
	if dir := os.Getenv("MAN_DIR"); dir != "" {
		return dir
	}
	return otherwise
}

// Write writes a page for the program and one for each of its commands into dir,
// which it makes.
func (b Book) Write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	var errs []error
	for _, cmd := range b.commands() {
		errs = append(errs, os.WriteFile(filepath.Join(dir, b.file(cmd)), []byte(b.page(cmd)), 0o644))
	}
	return errors.Join(errs...)
}

// Check reports every command without a page in dir, every flag that its
// command's page does not name, and every page without an EXIT STATUS.
func (b Book) Check(dir string) error {
	var errs []error
	for _, cmd := range b.commands() {
		name := b.file(cmd)
		page, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		text := strings.ReplaceAll(string(page), `\-`, "-")
		cmd.NonInheritedFlags().VisitAll(func(f *pflag.Flag) {
			if !strings.Contains(text, "--"+f.Name) {
				errs = append(errs, fmt.Errorf("%s does not name --%s", name, f.Name))
			}
		})
		if !strings.Contains(text, "\n.SH EXIT STATUS\n") {
			errs = append(errs, fmt.Errorf("%s has no EXIT STATUS", name))
		}
	}
	return errors.Join(errs...)
}

// commands are the program and its commands that help shows.
func (b Book) commands() []*cobra.Command {
	all := []*cobra.Command{b.Root}
	for _, cmd := range b.Root.Commands() {
		if cmd.IsAvailableCommand() {
			all = append(all, cmd)
		}
	}
	return all
}

func pageName(cmd *cobra.Command) string { return strings.ReplaceAll(cmd.CommandPath(), " ", "-") }

func (b Book) file(cmd *cobra.Command) string { return pageName(cmd) + "." + b.Section }

// page is the page of a command.
func (b Book) page(cmd *cobra.Command) string {
	long := cmd.Long
	if long == "" {
		long = cmd.Short + "."
	}
	if b.More != nil {
		long += "\n\n" + b.More(cmd)
	}
	body, sections := split(long)
	var w roff
	w.title(pageName(cmd), b.Section, b.Root.Name(), b.Edition)
	w.section("NAME")
	w.line(escape(pageName(cmd)) + ` \- ` + escape(cmd.Short))
	w.section("SYNOPSIS")
	w.line(`\fB` + escape(cmd.UseLine()) + `\fR`)
	if cmd.HasAvailableSubCommands() {
		w.line(".br")
		w.line(`\fB` + escape(cmd.Name()+" COMMAND [flags]") + `\fR`)
	}
	w.section("DESCRIPTION")
	w.paragraphs(body)
	if cmd.HasAvailableSubCommands() {
		w.section("COMMANDS")
		for _, sub := range b.commands()[1:] {
			w.item(`\fB`+escape(sub.Name())+`\fR`, sub.Short+"; see "+b.reference(sub))
		}
	}
	w.section("OPTIONS")
	cmd.InitDefaultHelpFlag()
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if !f.Hidden {
			w.item(term(f), about(f))
		}
	})
	for _, s := range sections {
		w.section(s.title)
		for _, r := range s.rows {
			w.item(`\fB`+escape(r.term)+`\fR`, r.text)
		}
	}
	if cmd.Example != "" {
		w.section("EXAMPLES")
		w.literal(cmd.Example)
	}
	w.section("SEE ALSO")
	w.line(escape(strings.Join(b.related(cmd), ", ")))
	return w.String()
}

func (b Book) reference(cmd *cobra.Command) string { return pageName(cmd) + "(" + b.Section + ")" }

// related are the other pages that the page of a command names.
func (b Book) related(cmd *cobra.Command) []string {
	var pages []string
	if cmd != b.Root {
		pages = append(pages, b.reference(b.Root))
	} else {
		for _, sub := range b.commands()[1:] {
			pages = append(pages, b.reference(sub))
		}
	}
	return append(pages, b.See...)
}

// term is how a flag is written on the command line.
func term(f *pflag.Flag) string {
	value, _ := pflag.UnquoteUsage(f)
	text := `\fB` + escape("--"+f.Name) + `\fR`
	if f.Shorthand != "" {
		text = `\fB` + escape("-"+f.Shorthand) + `\fR, ` + text
	}
	if value != "" {
		text += ` \fI` + escape(value) + `\fR`
	}
	return text
}

// about returns the description of a flag, with its default.
func about(f *pflag.Flag) string {
	_, usage := pflag.UnquoteUsage(f)
	if d := defaultOf(f); d != "" && !strings.Contains(usage, "(default ") {
		usage += " (default " + d + ")"
	}
	return usage
}

// defaultOf is the default of a flag as people write it on a command line, "" if
// it stands for nothing.
func defaultOf(f *pflag.Flag) string {
	switch f.Value.Type() {
	case "bool":
		if f.DefValue == "false" {
			return ""
		}
	case "stringArray", "stringSlice":
		return strings.Trim(f.DefValue, "[]")
	case "duration":
		if d, err := time.ParseDuration(f.DefValue); err == nil {
			return Duration(d)
		}
	}
	return f.DefValue
}
