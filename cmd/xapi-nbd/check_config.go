package main

import (
	"errors"
	"io/fs"
	"os"
	"reflect"
	"strings"

	"github.com/BurntSushi/toml"
	"github.com/spf13/pflag"
)

// configuration reads the settings as the service does, but goes on after each
// mistake: what cannot be read keeps its default, so that all the rest can be
// looked at too.
func (c *checker) configuration(flags *pflag.FlagSet, file string) {
	c.cfg = defaults()
	before := c.report.Problems
	source := c.configFile(file)
	const remedy = "Correct the flag or the key. Every key: man xapi-nbd.toml, or OPERATIONS.md in /usr/share/doc/xapi-nbd."
	if err := applyFlags(flags, &c.cfg); err != nil {
		c.problem("configuration", remedy, "%v", err)
	}
	for _, err := range parts(c.cfg.validate()) {
		// What is in front of the file's name is the name of the finding.
		c.problem("configuration", remedy, "%s", strings.TrimPrefix(err.Error(), "configuration "))
	}
	if f := flags.Lookup("ciphersuites"); f != nil && f.Changed {
		c.warning("configuration", "Drop the flag.", "--ciphersuites is ignored: the ciphers are those that xapi's policy allows")
	}
	if c.cfg.XapiSocket == "" {
		c.cfg.XapiSocket = findSocket()
	}
	if c.report.Problems == before {
		c.ok("configuration", "%s", source)
	}
}

// configFile reads the file key by key and says where the settings come from.
func (c *checker) configFile(path string) (source string) {
	name := path
	if name == "" {
		name = defaultConfigFile
	}
	data, err := os.ReadFile(name)
	switch {
	case errors.Is(err, fs.ErrNotExist) && path == "":
		return "flags and defaults; there is no " + name
	case err != nil:
		c.problem("configuration", "Name a file that can be read with --config, or drop the flag.", "%v", err)
		return ""
	}
	var values map[string]toml.Primitive
	meta, err := toml.Decode(string(data), &values)
	c.cfg.file, c.cfg.lines = name, linesOf(string(data), meta)
	if err != nil {
		c.problem("configuration", "Correct the line. The service does not start like this.", "%s: %v", name, tomlError(err))
		return ""
	}
	seen := make(map[string]bool)
	for _, key := range meta.Keys() {
		if seen[key[0]] {
			continue // in a table, which is unknown as a whole
		}
		seen[key[0]] = true
		line := c.cfg.lines[key.String()]
		field := settingNamed(&c.cfg, key[0])
		if field == nil {
			c.problem("configuration", "Remove the key, or correct its name. The service does not start like this.",
				"%s: line %d: unknown key %q", name, line, key.String())
			continue
		}
		if err := meta.PrimitiveDecode(values[key[0]], field); err != nil {
			c.problem("configuration", "Correct the value. The service does not start like this.",
				"%s: line %d: %s: %s", name, line, key[0], withoutPlace(err))
		}
	}
	return name + ", and flags"
}

// withoutPlace is what is wrong with a value; the caller knows where.
func withoutPlace(err error) string {
	var bad toml.ParseError
	if errors.As(err, &bad) {
		return bad.Message
	}
	return typeError.ReplaceAllString(err.Error(), "$3")
}

// settingNamed returns a pointer to the setting that a key of the file stands
// for, nil if there is none.
func settingNamed(cfg *config, key string) any {
	v := reflect.ValueOf(cfg).Elem()
	for i := range v.NumField() {
		// Case does not matter to the library either.
		if name := v.Type().Field(i).Tag.Get("toml"); name != "" && strings.EqualFold(name, key) {
			return v.Field(i).Addr().Interface()
		}
	}
	return nil
}

// parts are the errors that errors.Join has put together.
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
