package config

import (
	"errors"
	"os"
	"strings"

	"github.com/spf13/pflag"
)

// BindFlags defines the flags of serve. Parsing them writes to cfg, whose values are their
// defaults.
func BindFlags(f *pflag.FlagSet, cfg *Config) {
	f.SortFlags = false
	f.IntVar(&cfg.Port, "port", cfg.Port, "TCP `PORT` on all addresses, IPv4 and IPv6")
	f.StringArrayVar(&cfg.Listen, "listen", cfg.Listen, "`ADDR` to listen on instead of --port: host:port, [v6]:port or unix:/path; repeatable")
	f.StringVar(&cfg.Certfile, "certfile", cfg.Certfile, "`PEM` file with private key and certificate chain, key first")
	f.StringVar(&cfg.TLS, "tls", cfg.TLS, "`WHO` decides about TLS: xapi, require or off")
	f.StringVar(&cfg.XapiSocket, "xapi-socket", cfg.XapiSocket, "xapi's unix socket `PATH` (default "+strings.Join(XapiSockets, ", else ")+")")
	f.StringVar(&cfg.Inventory, "inventory", cfg.Inventory, "inventory file `PATH`")
	f.StringVar(&cfg.DeviceDir, "device-dir", cfg.DeviceDir, "folder `DIR` that VBD.device is relative to")
	f.StringVar(&cfg.StateDir, "state-dir", cfg.StateDir, "folder `DIR` of the journal, its lock and the control socket")
	f.IntVar(&cfg.MaxConnections, "max-connections", cfg.MaxConnections, "at most `N` negotiated connections")
	f.IntVar(&cfg.MaxVBDs, "max-vbds", cfg.MaxVBDs, "at most `N` VDIs plugged at one time")
	f.StringVar(&cfg.LogLevel, "log-level", cfg.LogLevel, "`LEVEL`: debug, info, warning or error")
	f.StringVar(&cfg.LogFormat, "log-format", cfg.LogFormat, "`FORMAT`: auto, text, json or syslog")
}

// XapiSockets are the paths of xapi's socket: the one that documentation names, and the
// one that xapi binds.
var XapiSockets = []string{"/var/xapi/xapi", "/var/lib/xcp/xapi"}

// findSocket returns the first of XapiSockets that exists, or the first: xapi
// may still be starting.
func findSocket() string {
	for _, path := range XapiSockets {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return XapiSockets[0]
}

// applyFlags copies the flags that were given, and only those.
func applyFlags(given *pflag.FlagSet, cfg *Config) error {
	own := pflag.NewFlagSet("", pflag.ContinueOnError)
	BindFlags(own, cfg)
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
