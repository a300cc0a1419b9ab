// Package tomlfile finds the lines that messages about a TOML file name, and puts the errors
// of the TOML library into one line each.
package tomlfile

import (
	"errors"
	"fmt"
	"reflect"
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

// Unknown returns an error, with its line, for the first key of a file, decoded into v, for
// which the program has no use; nil if there is none. That is also a key that differs from
// the program's in upper and lower case: the TOML library takes one for the other, and if a
// file has both it takes either.
func Unknown(text string, meta toml.MetaData, v any) error {
	for _, key := range meta.Keys() {
		if Spelling(v, key) == key.String() {
			continue
		}
		return fmt.Errorf("line %d: %s", Line(text, key), UnknownKey(v, key))
	}
	return nil
}

// UnknownKey is the text about a key that [Unknown] has found.
func UnknownKey(v any, key toml.Key) string {
	text := fmt.Sprintf("unknown key %q", key.String())
	if right := Spelling(v, key); right != "" {
		text += fmt.Sprintf("; it is spelt %q", right)
	}
	return text
}

// Spelling returns the key of v that is equal to key except for upper and lower case, "" if
// there is none. v is a struct, or a pointer to one, with the keys in its tags.
func Spelling(v any, key toml.Key) string {
	right := make(toml.Key, 0, len(key))
	t := reflect.TypeOf(v)
	for _, part := range key {
		for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice {
			t = t.Elem()
		}
		name, inside := fieldOf(t, part)
		if name == "" {
			return ""
		}
		right, t = append(right, name), inside
	}
	return right.String()
}

// fieldOf returns the key and the type of the field of a struct that a part of a key stands
// for, "" if there is none.
func fieldOf(t reflect.Type, part string) (name string, inside reflect.Type) {
	if t.Kind() != reflect.Struct {
		return "", nil
	}
	for i := range t.NumField() {
		tag := t.Field(i).Tag.Get("toml")
		if tag == part {
			return tag, t.Field(i).Type
		}
		if tag != "" && strings.EqualFold(tag, part) {
			name, inside = tag, t.Field(i).Type
		}
	}
	return name, inside
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
