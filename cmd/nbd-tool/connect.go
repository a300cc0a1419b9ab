package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/wire"
)

const (
	// dialTimeout covers connecting, the greeting and TLS.
	dialTimeout = 30 * time.Second
	// openTimeout is for a server to open an export: a XenServer host plugs the
	// disk meanwhile, and says itself when that takes too long.
	openTimeout = 2 * time.Minute
	// maxURI bounds what is read of a file that should hold a URI: an export
	// name of 4096 bytes, each percent-encoded, and a query.
	maxURI = 32 << 10
)

// connectFlags are the flags of every command that connects.
type connectFlags struct {
	ca       string
	insecure bool
}

func (f *connectFlags) bind(flags *pflag.FlagSet) {
	flags.StringVar(&f.ca, "tls-ca", "", "trust the certificates in this PEM `FILE`, instead of those of the system or the URI")
	flags.BoolVar(&f.insecure, "tls-insecure", false, "encrypt, but believe any certificate")
}

func bindURIFile(flags *pflag.FlagSet, name string, value *string, of string) {
	flags.StringVar(value, name, "", "read the URI"+of+" from `FILE`, or from standard input with -")
}

// target is where to connect, and how.
type target struct {
	uri *nbd.URI
	tls *tls.Config
}

// uriCommand completes a command that works on the export of one URI, given as
// argument or by --uri-file.
func uriCommand(cmd *cobra.Command, do func(cmd *cobra.Command, t *target) error) *cobra.Command {
	var (
		flags connectFlags
		file  string
	)
	flags.bind(cmd.Flags())
	bindURIFile(cmd.Flags(), "uri-file", &file, "")
	cmd.Use += " [flags] {URI | --uri-file FILE}"
	cmd.DisableFlagsInUseLine = true
	cmd.ValidArgsFunction = cobra.NoFileCompletions
	cmd.Args = func(_ *cobra.Command, args []string) error {
		if (file == "") != (len(args) == 1) || len(args) > 1 {
			return usagef("want one URI, or --uri-file")
		}
		return nil
	}
	cmd.RunE = action(func(cmd *cobra.Command, args []string) error {
		text := strings.Join(args, "")
		if file != "" {
			var err error
			if text, err = readURIFile(file, cmd.InOrStdin()); err != nil {
				return err
			}
		}
		t, err := flags.target(text)
		if err != nil {
			return err
		}
		return do(cmd, t)
	})
	return cmd
}

// readURIFile returns the one line of a file that is not empty.
func readURIFile(path string, stdin io.Reader) (string, error) {
	in := stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return "", err
		}
		defer f.Close()
		in = f
	}
	found := ""
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, maxURI)
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if line != "" && found != "" {
			return "", usagef("%s holds more than one line", uriFileName(path))
		}
		found += line
	}
	if err := lines.Err(); err != nil {
		return "", fmt.Errorf("reading the URI from %s: %w", uriFileName(path), err)
	}
	if found == "" {
		return "", usagef("%s holds no URI", uriFileName(path))
	}
	return found, nil
}

func uriFileName(path string) string {
	if path == "-" {
		return "standard input"
	}
	return path
}

// target understands a URI.
func (f *connectFlags) target(text string) (*target, error) {
	u, err := nbd.ParseURI(text)
	if err != nil {
		return nil, usageError{err}
	}
	t := &target{uri: u}
	if !u.TLS {
		if f.ca != "" || f.insecure {
			return nil, usagef("--tls-ca and --tls-insecure need a URI that begins with nbds")
		}
		return t, nil
	}
	t.tls, err = f.tlsConfig(u)
	return t, err
}

// tlsConfig is what URI and flags say about TLS.
func (f *connectFlags) tlsConfig(u *nbd.URI) (*tls.Config, error) {
	if u.TLSType != "" && u.TLSType != "x509" {
		return nil, usagef("tls-type=%s is not supported, only x509", u.TLSType)
	}
	if f.ca != "" && f.insecure {
		return nil, usagef("--tls-ca and --tls-insecure contradict each other")
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: u.TLSHostname}
	if cfg.ServerName == "" {
		cfg.ServerName = "localhost" // whom a unix socket belongs to
		if host, _, err := net.SplitHostPort(u.Addr); u.Network == "tcp" && err == nil {
			cfg.ServerName, _, _ = strings.Cut(host, "%") // without the zone
		}
	}
	cfg.InsecureSkipVerify = f.insecure || u.TLSVerifyPeer != nil && !*u.TLSVerifyPeer && f.ca == ""
	return cfg, f.loadCertificates(cfg, u.TLSCertificates)
}

// loadCertificates reads the CA, and the certificate of the client if the
// folder has one, under the names that other NBD tools use too.
func (f *connectFlags) loadCertificates(cfg *tls.Config, dir string) error {
	ca := f.ca
	if ca == "" && dir != "" && !cfg.InsecureSkipVerify {
		ca = filepath.Join(dir, "ca-cert.pem")
	}
	if ca != "" {
		pem, err := os.ReadFile(ca)
		if err != nil {
			return err
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return fmt.Errorf("%s holds no certificate", ca)
		}
	}
	if dir == "" {
		return nil
	}
	own, err := tls.LoadX509KeyPair(filepath.Join(dir, "client-cert.pem"), filepath.Join(dir, "client-key.pem"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // few servers ask for one
	}
	if err != nil {
		return fmt.Errorf("client certificate in %s: %w", dir, err)
	}
	cfg.Certificates = []tls.Certificate{own}
	return nil
}

// dial connects and greets. The caller ends the client.
func (t *target) dial(ctx context.Context, contexts ...string) (*nbd.Client, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	c, err := nbd.Dial(ctx, t.uri.Network, t.uri.Addr, &nbd.ClientConfig{TLSConfig: t.tls, MetaContexts: contexts})
	if err != nil {
		return nil, t.explain(err)
	}
	return c, nil
}

// open connects and opens the export. The caller closes the connection.
func (t *target) open(ctx context.Context, contexts ...string) (*nbd.Conn, error) {
	c, err := t.dial(ctx, contexts...)
	if err != nil {
		return nil, err
	}
	conn, err := t.goOn(ctx, c)
	if err != nil {
		_ = c.Abort()
		return nil, err
	}
	return conn, nil
}

// goOn opens the export over a client; if that fails the caller aborts it.
func (t *target) goOn(ctx context.Context, c *nbd.Client) (*nbd.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	conn, err := c.Go(ctx, t.uri.Export)
	if err != nil {
		return nil, t.explain(err)
	}
	return conn, nil
}

// explain says which server an error is about, and what to do where that is
// known.
func (t *target) explain(err error) error {
	var (
		refused *nbd.Error
		unknown x509.UnknownAuthorityError
		name    x509.HostnameError
		hint    string
	)
	switch {
	case errors.As(err, &refused) && refused.Reply == wire.RepErrTLSReqd:
		hint = " (use " + strings.Replace(t.uri.Server(), "nbd", "nbds", 1) + ")"
	case errors.As(err, &unknown):
		hint = " (--tls-ca FILE names whom to trust)"
	case errors.As(err, &name):
		hint = " (tls-hostname=NAME in the URI's query is the name to expect)"
	}
	return fmt.Errorf("%s: %w%s", t.uri.Server(), err, hint)
}
