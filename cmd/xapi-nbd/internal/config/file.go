package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/BurntSushi/toml"
	"github.com/spf13/pflag"

	"xapi-nbd/cmd/internal/tomlfile"
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
	cfg.file, cfg.lines = name, tomlfile.Lines(string(data), meta)
	if err != nil {
		return fmt.Errorf("configuration %s: %w", name, tomlfile.Error(err))
	}
	if err := tomlfile.Unknown(string(data), meta, cfg); err != nil {
		return fmt.Errorf("configuration %s: %w", name, err)
	}
	return nil
}
