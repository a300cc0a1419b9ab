package config

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"xapi-nbd/cmd/internal/listenaddr"
)

// Config is everything that can be set. Operators have its keys and flags in their
// files and command lines: they do not change. Times and sizes of 0 are explained in
// docs/OPERATIONS.md.
type Config struct {
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

	HandshakeTimeout    Duration `toml:"handshake_timeout"`
	AttachTimeout       Duration `toml:"attach_timeout"`
	FirstRequestTimeout Duration `toml:"first_request_timeout"`
	IdleTimeout         Duration `toml:"idle_timeout"`
	Linger              Duration `toml:"linger"`
	SessionRecheck      Duration `toml:"session_recheck"`
	StartupWait         Duration `toml:"startup_wait"`
	StopTimeout         Duration `toml:"stop_timeout"`
	DrainTimeout        Duration `toml:"drain_timeout"`
	MaxInflightBytes    ByteSize `toml:"max_inflight_bytes"`
	DirectIO            bool     `toml:"direct_io"`
	AllowWrite          bool     `toml:"allow_write"`

	Metrics      string   `toml:"metrics"`
	RateLimit    ByteSize `toml:"rate_limit"`
	RateLimitVDI ByteSize `toml:"rate_limit_vdi"`

	notes []string
	file  string         // the configuration file, "" without one
	lines map[string]int // of the settings that come from the file, by key
}

// Notes returns remarks for the log about flags and keys without effect.
func (c *Config) Notes() []string { return c.notes }

// ListenAddrs returns the addresses to listen on: those of Listen, else Port on all
// addresses.
func (c *Config) ListenAddrs() []string {
	if len(c.Listen) > 0 {
		return c.Listen
	}
	// Without a host Go listens on IPv6 and IPv4 with one socket.
	return []string{net.JoinHostPort("", strconv.Itoa(c.Port))}
}

// The values of --tls.
const (
	TLSXapi    = "xapi"
	TLSRequire = "require"
	TLSOff     = "off"
)

// Enum is a setting that takes one of a few values.
type Enum struct {
	Key    string
	Values []string
	value  func(*Config) string
}

// Enumerated are the settings that take one of a few values.
var Enumerated = []Enum{
	{"tls", []string{TLSXapi, TLSRequire, TLSOff}, func(c *Config) string { return c.TLS }},
	{"log_level", []string{"debug", "info", "warning", "error"}, func(c *Config) string { return c.LogLevel }},
	{"log_format", []string{"auto", "text", "json", "syslog"}, func(c *Config) string { return c.LogFormat }},
}

// alternatives lists values in prose: "xapi, require or off".
func alternatives(values []string) string {
	last := len(values) - 1
	return strings.Join(values[:last], ", ") + " or " + values[last]
}

// Default returns the settings of a service without a file and without flags.
func Default() Config {
	return Config{
		Port:                10809,
		TLS:                 TLSXapi,
		Inventory:           "/etc/xensource-inventory",
		DeviceDir:           "/dev",
		StateDir:            "/var/lib/xapi-nbd",
		MaxConnections:      256,
		MaxVBDs:             16,
		LogLevel:            "info",
		LogFormat:           "auto",
		HandshakeTimeout:    Duration(10 * time.Second),
		AttachTimeout:       Duration(45 * time.Second),
		FirstRequestTimeout: Duration(time.Minute),
		IdleTimeout:         Duration(time.Hour),
		Linger:              Duration(1500 * time.Millisecond),
		SessionRecheck:      Duration(5 * time.Minute),
		StartupWait:         Duration(300 * time.Second),
		StopTimeout:         Duration(10 * time.Second),
		DrainTimeout:        Duration(24 * time.Hour),
		MaxInflightBytes:    64 << 20,
		Metrics:             MetricsOff,
	}
}

// validate reports every setting that makes no sense, by its key.
func (c *Config) validate() error {
	var errs []error
	check := func(ok bool, key, want string, got any) {
		if !ok {
			errs = append(errs, fmt.Errorf("%s%s must be %s, got %v", c.whereIs(key), key, want, got))
		}
	}
	check(c.Port >= 0 && c.Port <= 65535, "port", "0 to 65535", c.Port)
	for _, e := range Enumerated {
		check(slices.Contains(e.Values, e.value(c)), e.Key, alternatives(e.Values), strconv.Quote(e.value(c)))
	}
	check(c.MaxConnections > 0, "max_connections", "at least 1", c.MaxConnections)
	check(c.MaxVBDs > 0, "max_vbds", "at least 1", c.MaxVBDs)
	check(c.MaxInflightBytes >= 1<<20, "max_inflight_bytes", "at least 1 MiB", int64(c.MaxInflightBytes))
	check(c.StartupWait >= 0, "startup_wait", "0s (for ever) or more", c.StartupWait)
	check(c.Linger >= 0, "linger", "0s (not at all) or more", c.Linger)
	slow := func(rate ByteSize) bool { return rate > 0 && rate < MinRate }
	check(!slow(c.RateLimit), "rate_limit", "0 (off) or at least 64 KiB", int64(c.RateLimit))
	check(!slow(c.RateLimitVDI), "rate_limit_vdi", "0 (off) or at least 64 KiB", int64(c.RateLimitVDI))
	check(c.SessionRecheck >= 0, "session_recheck", "0s (off) or more", c.SessionRecheck)
	for _, d := range []struct {
		key   string
		value Duration
	}{
		{"handshake_timeout", c.HandshakeTimeout}, {"attach_timeout", c.AttachTimeout},
		{"first_request_timeout", c.FirstRequestTimeout}, {"idle_timeout", c.IdleTimeout}, {"stop_timeout", c.StopTimeout},
		{"drain_timeout", c.DrainTimeout},
	} {
		check(d.value > 0, d.key, "more than 0s", d.value)
	}
	if c.TLS == TLSRequire && c.Certfile == "" {
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

// whereIs is the prefix of messages about a setting that comes from the file.
func (c *Config) whereIs(key string) string {
	if line := c.lines[key]; line > 0 {
		return fmt.Sprintf("configuration %s: line %d: ", c.file, line)
	}
	return ""
}

// MetricsOff is the value of metrics for no metrics.
const MetricsOff = "off"

// checkMetricsAddr returns an error for an invalid value of metrics. Only addresses of
// this host are allowed: metrics are no secret, but no other host needs them.
func checkMetricsAddr(addr string) error {
	if addr == MetricsOff {
		return nil
	}
	network, address, err := listenaddr.Split(addr)
	if err != nil {
		return fmt.Errorf(`%w; "off" is none`, err)
	}
	if network == "unix" {
		return nil
	}
	host, _, _ := net.SplitHostPort(address)
	if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return fmt.Errorf("%q is not on loopback", addr)
	}
	return nil
}

// MinRate is the lowest rate limit that can be set, in bytes per second: below it
// clients would give up on a read that waits.
const MinRate = 64 << 10
