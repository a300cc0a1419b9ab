package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/spf13/cobra"

	"xapi-nbd/cmd/internal/listenaddr"
	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdfile"
	"xapi-nbd/nbd/wire"
	nbdtls "xapi-nbd/tls"
)

// drainTimeout is how long the server waits at its end for the requests in flight and their
// replies.
const drainTimeout = 10 * time.Second

// serveOptions are the flags of serve.
type serveOptions struct {
	listen   string
	export   string
	certfile string
	cafile   string
	writable bool
}

func newServeCommand() *cobra.Command {
	var o serveOptions
	cmd := &cobra.Command{
		Use:   "serve [flags] FILE",
		Short: "Serve a file or a block device",
		Long: `Serve a file or a block device as an NBD export until SIGINT or SIGTERM, to
any client that can connect: read-only unless --writable is given, and on
loopback unless --listen names another address. Prints "listening on ADDR" when
it is ready; with port 0 the address has the port that the system chose.

With --certfile every client must use TLS. With --cafile it must also have a
certificate issued by one of those in FILE: clients pass theirs by
--tls-certificates, or tls-certificates in the URI.

Signals:
  SIGINT, SIGTERM  accept no more clients, let requests end for up to 10 seconds,
                   and exit with code 0; a second one ends the process at once`,
		Example: `  nbd-tool serve backup.img
  nbd-tool serve --writable --listen unix:/run/disk.sock disk.img
  nbd-tool serve --listen :10809 --certfile server.pem --cafile ca.pem backup.img`,
		DisableFlagsInUseLine: true,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usagef("want one file or block device")
			}
			return nil
		},
		RunE: action(func(cmd *cobra.Command, args []string) error { return o.serve(cmd, args[0]) }),
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&o.listen, "listen", fmt.Sprintf("localhost:%d", wire.DefaultPort), "`ADDR` to listen on: host:port, [v6]:port or unix:/path")
	f.BoolVar(&o.writable, "writable", false, "let clients change the file or device")
	f.StringVar(&o.export, "export", "", "`NAME` of the export; clients that ask for none get the empty one")
	f.StringVar(&o.certfile, "certfile", "", "`PEM` file with private key and certificate chain, key first")
	f.StringVar(&o.cafile, "cafile", "", "PEM `FILE` with the certificates that issue those of clients; needs --certfile")
	return cmd
}

// serve runs the server until ctx ends, and then returns nil.
func (o *serveOptions) serve(cmd *cobra.Command, path string) error {
	if _, _, err := listenaddr.Split(o.listen); err != nil {
		return usagef("--listen: %w", err)
	}
	if o.cafile != "" && o.certfile == "" {
		return usagef("--cafile needs --certfile: without TLS there are no certificates")
	}
	files := &fileExporter{path: path, name: o.export, opts: nbdfile.Options{ReadOnly: !o.writable}}
	if err := files.try(); err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	server := &nbd.Server{Exporter: files, Logger: log}
	if o.certfile != "" {
		var err error
		if server.TLSConfig, err = o.tlsConfig(log); err != nil {
			return err
		}
		server.TLSPolicy = func(context.Context, nbd.Peer) (nbd.TLSMode, error) { return nbd.ForcedTLS, nil }
	}
	ctx := cmd.Context()
	l, err := listenaddr.Listen(ctx, o.listen)
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(ctx, l) }() // ends with ctx, at the latest
	if _, err := fmt.Fprintf(cmd.OutOrStdout(), "listening on %s\n", shown(l.Addr())); err != nil {
		l.Close()
		return errors.Join(err, <-ended)
	}
	err = <-ended
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
	defer cancel()
	_ = server.Shutdown(drain) // closes the connections that are left after that
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// tlsConfig reads the certificate and reads it again when the file changes. It reads the
// certificates of --cafile once.
func (o *serveOptions) tlsConfig(log *slog.Logger) (*tls.Config, error) {
	r, err := nbdtls.NewReloader(o.certfile, log)
	if err != nil {
		return nil, err
	}
	cfg := nbdtls.ServerConfig(r)
	if o.cafile == "" {
		return cfg, nil
	}
	issuers, err := readCertificates(o.cafile)
	if err != nil {
		return nil, err
	}
	current := cfg.GetConfigForClient
	cfg.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		c, err := current(hello)
		if err != nil {
			return nil, err
		}
		c = c.Clone() // all connections share it
		c.ClientAuth, c.ClientCAs = tls.RequireAndVerifyClientCert, issuers
		return c, nil
	}
	return cfg, nil
}

// shown returns an address in the syntax of --listen.
func shown(a net.Addr) string {
	if a.Network() == "unix" {
		return "unix:" + a.String()
	}
	return a.String()
}

// fileExporter has one export. Each connection opens the file; the kernel keeps the open
// files consistent.
type fileExporter struct {
	path, name string
	opts       nbdfile.Options
}

// try opens and closes the file, to report an error before the server listens.
func (e *fileExporter) try() error {
	d, err := nbdfile.Open(e.path, e.opts)
	if err != nil {
		return err
	}
	return d.Close()
}

// Open implements nbd.Exporter.
func (e *fileExporter) Open(_ context.Context, _ nbd.Peer, name string) (nbd.Device, error) {
	if name != e.name {
		return nil, nbd.Refuse(nbd.ErrUnknownExport, "no such export", nil)
	}
	return nbdfile.Open(e.path, e.opts)
}

// List implements nbd.Lister.
func (e *fileExporter) List(context.Context, nbd.Peer) ([]nbd.Export, error) {
	return []nbd.Export{{Name: e.name}}, nil
}
