package main

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"xapi-nbd/cmd/internal/listenaddr"
	"xapi-nbd/nbd/wire"
)

// serveOptions are the flags of serve.
type serveOptions struct {
	config     string // a file, in place of most of the others
	listen     string
	port       uint16
	export     string
	certfile   string
	cafile     string
	writable   bool
	forgiveNUL bool
}

// defaultListen is the address without --listen.
var defaultListen = fmt.Sprintf("localhost:%d", wire.DefaultPort)

func newServeCommand() *cobra.Command {
	var o serveOptions
	cmd := &cobra.Command{
		Use:   "serve [flags] FILE\n  nbd-tool serve [flags] --config FILE",
		Short: "Serve files and block devices",
		Long: `Serve a file or a block device as an NBD export until SIGINT or SIGTERM, to
any client that can connect: read-only unless --writable is given, and on
loopback unless --listen names another address. Prints "listening on ADDR" when
it is ready; with port 0 the address has the port that the system chose.

With --certfile every client must use TLS. With --cafile it must also have a
certificate issued by one of those in FILE: clients pass theirs by
--tls-certificates, or tls-certificates in the URI.

Several exports: --config FILE names a file in the format TOML. Paths in it are
absolute, and keys that it does not know are refused.

  listen = [":10809", "unix:/run/nbd.sock"]  # localhost:10809 if left out
  certfile = "/etc/nbd/server.pem"  # as --certfile; without it there is no TLS
  cafile = "/etc/nbd/ca.pem"        # as --cafile

  [[export]]                        # one for each export
  name = "disk"                     # "" for clients that ask for no name
  path = "/srv/disk.img"            # a file or a block device
  read_only = false                 # true if left out
  description = "disk of the shop"  # for people; may be left out

No two exports may have the same name, or the same file if both are writable.

SIGHUP reads the file of --config again. If it has a mistake, a file in it cannot be
opened, or an address cannot be listened on, nothing changes and the log has the reason.
Otherwise new clients are served as it says. No connection ends: a client keeps the file
that it has opened, read-only or not, until it disconnects, even if the export was
removed or TLS is required now. A client that has not opened its export yet must meet
what is required now.

With sockets from systemd (a .socket unit), these are used in place of --listen and of
listen in the file.

tapdisk as client, for a mirror of a running disk: its client asks for the export
"tapdisk_client" with a NUL behind the name, which the protocol forbids. With
--forgive-nul one NUL at the end of a name is ignored, and clients may be idle for as long
as they like. tapdisk never flushes: run sync before the machine may lose power.

--exportname, --no-tls and --port are those of the original nbd-tool. Its --ciphersuites
and --curve are accepted and ignored: TLS is 1.2 or 1.3 with strong ciphers.

Signals:
  SIGHUP           with --config: read the file again
  SIGINT, SIGTERM  accept no more clients, let requests end for up to 10 seconds,
                   and exit with code 0; a second one ends the process at once`,
		Example: `  nbd-tool serve backup.img
  nbd-tool serve --writable --listen unix:/run/disk.sock disk.img
  nbd-tool serve --listen :10809 --certfile server.pem --cafile ca.pem backup.img
  nbd-tool serve --config /etc/nbd/exports.toml
  nbd-tool serve --writable --forgive-nul --export tapdisk_client --listen 192.0.2.1:10809 mirror.img`,
		DisableFlagsInUseLine: true,
		Args: func(_ *cobra.Command, args []string) error {
			switch {
			case o.config != "" && len(args) > 0:
				return usagef("--config and FILE exclude each other: add the file to %s", o.config)
			case o.config == "" && len(args) != 1:
				return usagef("want one file or block device; for several: --config FILE")
			}
			return nil
		},
		RunE: action(func(cmd *cobra.Command, args []string) error {
			if err := o.check(cmd.Flags()); err != nil {
				return err
			}
			surviveBrokenPipes()
			s := newFileServer(o.source(args), cmd.OutOrStdout(), cmd.ErrOrStderr())
			warnIgnored(cmd.Flags(), s.log)
			if o.forgiveNUL {
				s.forgiveNUL()
			}
			return s.run(cmd.Context())
		}),
	}
	o.bind(cmd.Flags())
	return cmd
}

// bind defines the flags.
func (o *serveOptions) bind(f *pflag.FlagSet) {
	f.SortFlags = false
	f.StringVar(&o.config, "config", "", "serve the exports of `FILE`, in the format TOML")
	f.BoolVar(&o.writable, "writable", false, "let clients change the file or device")
	o.bindServer(f)
	f.BoolVar(&o.forgiveNUL, "forgive-nul", false, "ignore one NUL at the end of the name that a client asks for, as tapdisk does")
}

// bindServer defines the flags of every command that serves one export.
func (o *serveOptions) bindServer(f *pflag.FlagSet) {
	f.StringVar(&o.listen, "listen", defaultListen, "`ADDR` to listen on: host:port, [v6]:port or unix:/path")
	f.StringVar(&o.export, "export", "", "`NAME` of the export; clients that ask for none get the empty one")
	f.StringVar(&o.certfile, "certfile", "", "`PEM` file with private key and certificate chain, key first")
	f.StringVar(&o.cafile, "cafile", "", "PEM `FILE` with the certificates that issue those of clients; needs --certfile")
	f.StringVar(&o.export, "exportname", "", "`NAME`: same as --export")
	f.Uint16Var(&o.port, "port", wire.DefaultPort, "`PORT`: same as --listen localhost:PORT")
	f.Bool("no-tls", false, "without TLS, as is the case without --certfile")
	for _, ignored := range ignoredFlags {
		f.String(ignored, "", "accepted for the original's command lines, and ignored (`LIST`)")
	}
}

// ignoredFlags are those flags of the original that have no effect.
var ignoredFlags = []string{"ciphersuites", "curve"}

// warnIgnored logs those flags that are given and have no effect.
func warnIgnored(f *pflag.FlagSet, log *slog.Logger) {
	for _, name := range ignoredFlags {
		if f.Changed(name) {
			log.Warn("--" + name + " is ignored: TLS uses the ciphers and curves of this program")
		}
	}
}

// exclusiveFlags are pairs of flags that exclude each other.
var exclusiveFlags = [][2]string{{"export", "exportname"}, {"listen", "port"}, {"no-tls", "certfile"}, {"no-tls", "cafile"}}

// check returns an error for flags that do not fit together.
func (o *serveOptions) check(f *pflag.FlagSet) error {
	for _, pair := range exclusiveFlags {
		if f.Changed(pair[0]) && f.Changed(pair[1]) {
			return usagef("--%s and --%s exclude each other", pair[0], pair[1])
		}
	}
	var inFile []string
	f.Visit(func(flag *pflag.Flag) {
		if flag.Name != "config" && flag.Name != "forgive-nul" && !slices.Contains(ignoredFlags, flag.Name) {
			inFile = append(inFile, "--"+flag.Name)
		}
	})
	if o.config != "" && inFile != nil {
		return usagef("--config and %s exclude each other: it is set in the file", strings.Join(inFile, ", "))
	}
	if f.Changed("port") {
		o.listen = fmt.Sprintf("localhost:%d", o.port)
	}
	if _, _, err := listenaddr.Split(o.listen); err != nil {
		return usagef("--listen: %w", err)
	}
	if o.cafile != "" && o.certfile == "" {
		return usagef("--cafile needs --certfile: %w", errNoTLS)
	}
	return nil
}

var errNoTLS = errors.New("without TLS there are no certificates")

// source returns where the settings come from.
func (o *serveOptions) source(args []string) settingsSource {
	if o.config != "" {
		return settingsSource{file: o.config}
	}
	return settingsSource{fixed: &serveSettings{
		listen: []string{o.listen}, certfile: o.certfile, cafile: o.cafile,
		exports: []export{{name: o.export, path: args[0], writable: o.writable}},
	}}
}
