package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"reflect"
	"strings"

	"github.com/BurntSushi/toml"
	"github.com/spf13/pflag"

	"xapi-nbd/cmd/internal/tomlfile"
)

// Mistake is a fault of the settings with which the service does not start.
type Mistake struct{ Text, Remedy string }

// Inspect reads the settings like Load, but goes on after each mistake: a setting with an
// invalid value keeps its default. source says where the settings come from; it is "" if
// the file could not be read.
func Inspect(flags *pflag.FlagSet, file string) (cfg Config, source string, mistakes []Mistake) {
	i := inspection{cfg: Default()}
	source = i.file(file)
	const remedy = "Correct the flag or the key. Every key: man xapi-nbd.toml, or OPERATIONS.md in /usr/share/doc/xapi-nbd."
	if err := applyFlags(flags, &i.cfg); err != nil {
		i.add(remedy, "%v", err)
	}
	for _, err := range parts(i.cfg.validate()) {
		i.add(remedy, "%s", strings.TrimPrefix(err.Error(), "configuration "))
	}
	i.cfg.complete(flags)
	return i.cfg, source, i.mistakes
}

// inspection is the state of Inspect.
type inspection struct {
	cfg      Config
	mistakes []Mistake
}

func (i *inspection) add(remedy, format string, args ...any) {
	i.mistakes = append(i.mistakes, Mistake{fmt.Sprintf(format, args...), remedy})
}

// file reads the file key by key and says where the settings come from.
func (i *inspection) file(path string) (source string) {
	name := path
	if name == "" {
		name = DefaultFile
	}
	data, err := os.ReadFile(name)
	switch {
	case errors.Is(err, fs.ErrNotExist) && path == "":
		return "flags and defaults; there is no " + name
	case err != nil:
		i.add("Name a file that can be read with --config, or drop the flag.", "%v", err)
		return ""
	}
	var values map[string]toml.Primitive
	meta, err := toml.Decode(string(data), &values)
	i.cfg.file, i.cfg.lines = name, tomlfile.Lines(string(data), meta)
	if err != nil {
		i.add("Correct the line. The service does not start like this.", "%s: %v", name, tomlfile.Error(err))
		return ""
	}
	seen := make(map[string]bool)
	for _, key := range meta.Keys() {
		if seen[key[0]] {
			continue // in a table, which is unknown as a whole
		}
		seen[key[0]] = true
		line := i.cfg.lines[key.String()]
		field := settingNamed(&i.cfg, key[0])
		if field == nil {
			i.add("Remove the key, or correct its name. The service does not start like this.",
				"%s: line %d: %s", name, line, tomlfile.UnknownKey(i.cfg, key))
			continue
		}
		if err := meta.PrimitiveDecode(values[key[0]], field); err != nil {
			i.add("Correct the value. The service does not start like this.",
				"%s: line %d: %s: %s", name, line, key[0], tomlfile.Message(err))
		}
	}
	return name + ", and flags"
}

// settingNamed returns a pointer to the setting that a key of the file stands
// for, nil if there is none.
func settingNamed(cfg *Config, key string) any {
	v := reflect.ValueOf(cfg).Elem()
	for i := range v.NumField() {
		if name := v.Type().Field(i).Tag.Get("toml"); name != "" && name == key {
			return v.Field(i).Addr().Interface()
		}
	}
	return nil
}

// parts returns the errors that errors.Join has joined.
func parts(err error) []error {
	var joined interface{ Unwrap() []error }
	if errors.As(err, &joined) {
		return joined.Unwrap()
	}
	if err != nil {
		return []error{err}
	}
	return nil
}
