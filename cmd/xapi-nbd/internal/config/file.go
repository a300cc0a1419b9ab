package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"strings"

	"github.com/BurntSushi/toml"
	"github.com/spf13/pflag"
)

// DefaultFile is read if it exists and no other file is named.
const DefaultFile = "/etc/xapi-nbd.toml"

// Load puts the defaults, the TOML file and the flags that were given together and
// checks the result. file may be "": then DefaultFile is read if it exists.
func Load(flags *pflag.FlagSet, file string) (Config, error) {
	cfg, err := Read(flags, file)
	if err != nil {
		return cfg, err
	}
	return cfg, cfg.validate()
}

// Read is Load without the check, for commands that need only some of the settings.
func Read(flags *pflag.FlagSet, file string) (Config, error) {
	cfg := Default()
	if err := readFile(file, &cfg); err != nil {
		return cfg, err
	}
	if err := applyFlags(flags, &cfg); err != nil {
		return cfg, err
	}
	cfg.complete(flags)
	return cfg, nil
}

// complete adds the notes about flags that are not settings, and finds the socket of xapi if
// xapi_socket was left out.
func (c *Config) complete(flags *pflag.FlagSet) {
	if f := flags.Lookup("ciphersuites"); f != nil && f.Changed {
		c.notes = append(c.notes, "--ciphersuites is ignored: the ciphers are those that xapi's policy allows")
	}
	if c.XapiSocket == "" {
		c.XapiSocket = findSocket()
	}
}

// readFile reads a TOML file over cfg. Without a name the default file
// may be missing.
func readFile(path string, cfg *Config) error {
	name := path
	if name == "" {
		name = DefaultFile
	}
	data, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) && path == "" {
		return nil
	}
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	meta, err := toml.Decode(string(data), cfg)
	cfg.file, cfg.lines = name, linesOf(string(data), meta)
	if err != nil {
		return fmt.Errorf("configuration %s: %w", name, tomlError(err))
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		return fmt.Errorf("configuration %s: line %d: unknown key %q", name, lineOf(string(data), unknown[0]), unknown[0].String())
	}
	return nil
}

// typeError matches the error of the TOML library about a value of a wrong type.
var typeError = regexp.MustCompile(`^toml: (line \d+) \(last key "([^"]*)"\): (.*)$`)

// tomlError turns an error of the TOML library into one line: the place, the key and the
// error.
func tomlError(err error) error {
	var bad toml.ParseError
	switch {
	case !errors.As(err, &bad):
		return errors.New(typeError.ReplaceAllString(err.Error(), "$1: $2: $3"))
	case bad.LastKey == "":
		return fmt.Errorf("line %d: %s", bad.Position.Line, bad.Message)
	}
	return fmt.Errorf("line %d: %s: %s", bad.Position.Line, bad.LastKey, bad.Message)
}

// linesOf returns the line of each key.
func linesOf(text string, meta toml.MetaData) map[string]int {
	lines := make(map[string]int)
	for _, key := range meta.Keys() {
		lines[key.String()] = lineOf(text, key)
	}
	return lines
}

// lineOf returns the line of a key, which the TOML library does not export. A key in a
// table is searched after the header of the table.
func lineOf(text string, key toml.Key) int {
	table, last := key[:len(key)-1].String(), key[len(key)-1]
	inTable := table == ""
	n := 0
	for line := range strings.Lines(text) {
		n++
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			header := strings.Trim(line, "[] \t")
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
