package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/BurntSushi/toml"
	"github.com/spf13/pflag"

	"xapi-nbd/cmd/internal/listenaddr"
)

// defaultConfigFile is read when it exists and no other is named.
const defaultConfigFile = "/etc/xapi-nbd.toml"

// config is everything that can be set. Its keys, flags and defaults are what
// operators have in their files: they do not change.
type config struct {
	Port           int      `toml:"port"`
	Listen         []string `toml:"listen"`
	Certfile       string   `toml:"certfile"`
	TLS            string   `toml:"tls"`
	XapiSocket     string   `toml:"xapi_socket"`
	Inventory      string   `toml:"inventory"`
	DeviceDir      string   `toml:"device_dir"`
	StateDir       string   `toml:"state_dir"`
	MaxConnections int      `toml:"max_connections"`
	MaxVBDs        int      `toml:"max_vbds"`
	LogLevel       string   `toml:"log_level"`
	LogFormat      string   `toml:"log_format"`

	HandshakeTimeout    duration `toml:"handshake_timeout"`
	AttachTimeout       duration `toml:"attach_timeout"`
	FirstRequestTimeout duration `toml:"first_request_timeout"`
	IdleTimeout         duration `toml:"idle_timeout"`
	Linger              duration `toml:"linger"`
	SessionRecheck      duration `toml:"session_recheck"`
	StartupWait         duration `toml:"startup_wait"`
	StopTimeout         duration `toml:"stop_timeout"`
	MaxInflightBytes    byteSize `toml:"max_inflight_bytes"`
	DirectIO            bool     `toml:"direct_io"`

	Metrics      string   `toml:"metrics"`
	RateLimit    byteSize `toml:"rate_limit"`
	RateLimitVDI byteSize `toml:"rate_limit_vdi"`

	// notes are for the log once there is one.
	notes []string
	// file is the configuration file, and lines are where the settings stand in it
	// that come from there.
	file  string
	lines map[string]int
}

// The values of --tls.
const (
	tlsXapi    = "xapi"
	tlsRequire = "require"
	tlsOff     = "off"
)

// enumerated are the settings that take one of a few values.
var enumerated = []struct {
	key    string
	value  func(*config) string
	values []string
}{
	{"tls", func(c *config) string { return c.TLS }, []string{tlsXapi, tlsRequire, tlsOff}},
	{"log_level", func(c *config) string { return c.LogLevel }, []string{"debug", "info", "warning", "error"}},
	{"log_format", func(c *config) string { return c.LogFormat }, []string{"auto", "text", "json", "syslog"}},
}

// alternatives lists values in prose: "xapi, require or off".
func alternatives(values []string) string {
	last := len(values) - 1
	return strings.Join(values[:last], ", ") + " or " + values[last]
}

func defaults() config {
	return config{
		Port:                10809,
		TLS:                 tlsXapi,
		Inventory:           "/etc/xensource-inventory",
		DeviceDir:           "/dev",
		StateDir:            "/var/lib/xapi-nbd",
		MaxConnections:      256,
		MaxVBDs:             16,
		LogLevel:            "info",
		LogFormat:           "auto",
		HandshakeTimeout:    duration(10 * time.Second),
		AttachTimeout:       duration(45 * time.Second),
		FirstRequestTimeout: duration(time.Minute),
		IdleTimeout:         duration(time.Hour),
		Linger:              duration(1500 * time.Millisecond),
		SessionRecheck:      duration(5 * time.Minute),
		StartupWait:         duration(300 * time.Second),
		StopTimeout:         duration(10 * time.Second),
		MaxInflightBytes:    64 << 20,
		Metrics:             metricsOff,
	}
}

// bindFlags defines the flags of serve, which write into cfg.
func bindFlags(f *pflag.FlagSet, cfg *config) {
	f.SortFlags = false
	f.IntVar(&cfg.Port, "port", cfg.Port, "TCP `PORT` on all addresses, IPv4 and IPv6")
	f.StringArrayVar(&cfg.Listen, "listen", cfg.Listen, "`ADDR` to listen on instead of --port: host:port, [v6]:port or unix:/path; repeatable")
	f.StringVar(&cfg.Certfile, "certfile", cfg.Certfile, "`PEM` file with private key and certificate chain, key first")
	f.StringVar(&cfg.TLS, "tls", cfg.TLS, "`WHO` decides about TLS: xapi, require or off")
	f.StringVar(&cfg.XapiSocket, "xapi-socket", cfg.XapiSocket, "xapi's unix socket `PATH` (default "+strings.Join(xapiSockets, ", else ")+")")
	f.StringVar(&cfg.Inventory, "inventory", cfg.Inventory, "inventory file `PATH`")
	f.StringVar(&cfg.DeviceDir, "device-dir", cfg.DeviceDir, "folder `DIR` that VBD.device is relative to")
	f.StringVar(&cfg.StateDir, "state-dir", cfg.StateDir, "folder `DIR` of the journal, its lock and the control socket")
	f.IntVar(&cfg.MaxConnections, "max-connections", cfg.MaxConnections, "at most `N` negotiated connections")
	f.IntVar(&cfg.MaxVBDs, "max-vbds", cfg.MaxVBDs, "at most `N` VDIs plugged at one time")
	f.StringVar(&cfg.LogLevel, "log-level", cfg.LogLevel, "`LEVEL`: debug, info, warning or error")
	f.StringVar(&cfg.LogFormat, "log-format", cfg.LogFormat, "`FORMAT`: auto, text, json or syslog")
}

// xapiSockets are where xapi's socket is: the name that clients are told, and
// the one that xapi binds.
var xapiSockets = []string{"/var/xapi/xapi", "/var/lib/xcp/xapi"}

// loadConfig puts defaults, file and flags together and checks the result.
func loadConfig(flags *pflag.FlagSet, file string) (config, error) {
	cfg, err := readConfig(flags, file, defaults())
	if err != nil {
		return cfg, err
	}
	return cfg, cfg.validate()
}

// readConfig is loadConfig without the check, for those who need only some of
// the settings, and with defaults of their own.
func readConfig(flags *pflag.FlagSet, file string, cfg config) (config, error) {
	if err := readConfigFile(file, &cfg); err != nil {
		return cfg, err
	}
	if err := applyFlags(flags, &cfg); err != nil {
		return cfg, err
	}
	if f := flags.Lookup("ciphersuites"); f != nil && f.Changed {
		cfg.notes = append(cfg.notes, "--ciphersuites is ignored: the ciphers are those that xapi's policy allows")
	}
	if cfg.XapiSocket == "" {
		cfg.XapiSocket = findSocket()
	}
	return cfg, nil
}

// findSocket returns the first of xapiSockets that exists, or the first: xapi
// may still be starting.
func findSocket() string {
	for _, path := range xapiSockets {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return xapiSockets[0]
}

// applyFlags copies the flags that were given, and only those.
func applyFlags(given *pflag.FlagSet, cfg *config) error {
	own := pflag.NewFlagSet("", pflag.ContinueOnError)
	bindFlags(own, cfg)
	var errs []error
	given.Visit(func(f *pflag.Flag) {
		target := own.Lookup(f.Name)
		if target == nil {
			return // not a setting
		}
		delete(cfg.lines, strings.ReplaceAll(f.Name, "-", "_"))
		if list, ok := f.Value.(pflag.SliceValue); ok {
			errs = append(errs, target.Value.(pflag.SliceValue).Replace(list.GetSlice()))
			return
		}
		errs = append(errs, target.Value.Set(f.Value.String()))
	})
	return errors.Join(errs...)
}

// readConfigFile reads a TOML file over cfg. Without a name the default file
// may be missing.
func readConfigFile(path string, cfg *config) error {
	name := path
	if name == "" {
		name = defaultConfigFile
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

// typeError is how the library says that a value has a wrong type.
var typeError = regexp.MustCompile(`^toml: (line \d+) \(last key "([^"]*)"\): (.*)$`)

// tomlError is an error of the library in one line, for the log: where, what for,
// and what.
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

// linesOf finds the lines of all keys.
func linesOf(text string, meta toml.MetaData) map[string]int {
	lines := make(map[string]int)
	for _, key := range meta.Keys() {
		lines[key.String()] = lineOf(text, key)
	}
	return lines
}

// lineOf finds the line of a key, which the library knows but does not tell. A
// key in a table is looked for behind the table's header.
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

// validate reports every setting that makes no sense, by its key.
func (c *config) validate() error {
	var errs []error
	check := func(ok bool, key, want string, got any) {
		if !ok {
			errs = append(errs, fmt.Errorf("%s%s must be %s, got %v", c.whereIs(key), key, want, got))
		}
	}
	check(c.Port >= 0 && c.Port <= 65535, "port", "0 to 65535", c.Port)
	for _, e := range enumerated {
		check(slices.Contains(e.values, e.value(c)), e.key, alternatives(e.values), strconv.Quote(e.value(c)))
	}
	check(c.MaxConnections > 0, "max_connections", "at least 1", c.MaxConnections)
	check(c.MaxVBDs > 0, "max_vbds", "at least 1", c.MaxVBDs)
	check(c.MaxInflightBytes >= 1<<20, "max_inflight_bytes", "at least 1 MiB", int64(c.MaxInflightBytes))
	check(c.StartupWait >= 0, "startup_wait", "0s (for ever) or more", c.StartupWait)
	check(c.Linger >= 0, "linger", "0s (not at all) or more", c.Linger)
	slow := func(rate byteSize) bool { return rate > 0 && rate < minRate }
	check(!slow(c.RateLimit), "rate_limit", "0 (off) or at least 64 KiB", int64(c.RateLimit))
	check(!slow(c.RateLimitVDI), "rate_limit_vdi", "0 (off) or at least 64 KiB", int64(c.RateLimitVDI))
	check(c.SessionRecheck >= 0, "session_recheck", "0s (off) or more", c.SessionRecheck)
	for _, d := range []struct {
		key   string
		value duration
	}{
		{"handshake_timeout", c.HandshakeTimeout}, {"attach_timeout", c.AttachTimeout},
		{"first_request_timeout", c.FirstRequestTimeout}, {"idle_timeout", c.IdleTimeout}, {"stop_timeout", c.StopTimeout},
	} {
		check(d.value > 0, d.key, "more than 0s", d.value)
	}
	if c.TLS == tlsRequire && c.Certfile == "" {
		errs = append(errs, errors.New(c.whereIs("tls")+`tls = "require" needs a certfile`))
	}
	for _, addr := range c.Listen {
		if _, _, err := listenaddr.Split(addr); err != nil {
			errs = append(errs, fmt.Errorf("%slisten: %w", c.whereIs("listen"), err))
		}
	}
	if err := checkMetricsAddr(c.Metrics); err != nil {
		errs = append(errs, fmt.Errorf("%smetrics: %w", c.whereIs("metrics"), err))
	}
	return errors.Join(errs...)
}

// whereIs is in front of what is said about a setting that comes from the file.
func (c *config) whereIs(key string) string {
	if line := c.lines[key]; line > 0 {
		return fmt.Sprintf("configuration %s: line %d: ", c.file, line)
	}
	return ""
}

// duration is a time.Duration that TOML spells with a unit ("30s").
type duration time.Duration

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return fmt.Errorf(`want a duration with a unit such as "30s", got %q`, b)
	}
	*d = duration(v)
	return nil
}

func (d duration) String() string { return time.Duration(d).String() }

// byteSize is a number of bytes; TOML may spell it as a number or as a string
// with KiB, MiB or GiB ("64 MiB").
type byteSize int64

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *byteSize) UnmarshalText(b []byte) error {
	text, shift := strings.TrimSpace(string(b)), 0
	for unit, n := range map[string]int{"KiB": 10, "MiB": 20, "GiB": 30} {
		if rest, ok := strings.CutSuffix(text, unit); ok {
			text, shift = strings.TrimSpace(rest), n
			break
		}
	}
	v, err := strconv.ParseInt(text, 10, 64)
	if err != nil || v < 0 || v > (1<<62)>>shift {
		return fmt.Errorf(`want a number of bytes or a size such as "64 MiB", got %q`, b)
	}
	*s = byteSize(v << shift)
	return nil
}
