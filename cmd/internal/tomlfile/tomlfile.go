// Package tomlfile finds the lines that messages about a TOML file name, and puts the errors
// of the TOML library into one line each.
package tomlfile

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/BurntSushi/toml"
)

// typeError matches the error of the TOML library about a value of a wrong type.
var typeError = regexp.MustCompile(`^toml: (line \d+) \(last key "([^"]*)"\): (.*)$`)

// Error turns an error of [toml.Decode] into one line: the place, the key and the error.
func Error(err error) error {
	var bad toml.ParseError
	switch {
	case !errors.As(err, &bad):
		return errors.New(typeError.ReplaceAllString(err.Error(), "$1: $2: $3"))
	case bad.LastKey == "":
		return fmt.Errorf("line %d: %s", bad.Position.Line, bad.Message)
	}
	return fmt.Errorf("line %d: %s: %s", bad.Position.Line, bad.LastKey, bad.Message)
}

// Message returns the text of an error of the TOML library without its line and key.
func Message(err error) string {
	var bad toml.ParseError
	if errors.As(err, &bad) {
		return bad.Message
	}
	return typeError.ReplaceAllString(err.Error(), "$3")
}

// Unknown returns an error, with its line, for the first key of a decoded file for which the
// program has no use, nil if there is none.
func Unknown(text string, meta toml.MetaData) error {
	unknown := meta.Undecoded()
	if len(unknown) == 0 {
		return nil
	}
	return fmt.Errorf("line %d: unknown key %q", Line(text, unknown[0]), unknown[0].String())
}

// Lines returns the line of each key.
func Lines(text string, meta toml.MetaData) map[string]int {
	lines := make(map[string]int)
	for _, key := range meta.Keys() {
		lines[key.String()] = Line(text, key)
	}
	return lines
}

// Line returns the line of a key, which the TOML library does not export, 0 if it is not
// found. A key in a table is searched after the header of the table. If there are several
// tables with this header, that is the first of them with the key.
func Line(text string, key toml.Key) int {
	table, last := key[:len(key)-1].String(), key[len(key)-1]
	inTable := table == ""
	n := 0
	for line := range strings.Lines(text) {
		n++
		if header, ok := headerIn(line); ok {
			if header == key.String() {
				return n
			}
			inTable = header == table
		}
		name, _, found := strings.Cut(line, "=")
		name = strings.TrimSpace(name)
		if found && (inTable && strings.Trim(name, `"'`) == last || name == key.String()) {
			return n
		}
	}
	return 0
}

// TableLines returns the line of each header of the table or array of tables.
func TableLines(text, table string) (lines []int) {
	n := 0
	for line := range strings.Lines(text) {
		n++
		if header, ok := headerIn(line); ok && header == table {
			lines = append(lines, n)
		}
	}
	return lines
}

// headerIn returns the name of the table, or array of tables, that begins with this line.
func headerIn(line string) (name string, ok bool) {
	line = strings.TrimSpace(line)
	if !strings.HasPrefix(line, "[") {
		return "", false
	}
	line, _, _ = strings.Cut(line, "#")
	return strings.Trim(line, "[] \t"), true
}
