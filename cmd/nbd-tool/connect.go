package main

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"xapi-nbd/nbd/client"
)

const (
	// dialTimeout covers connecting, the greeting and TLS.
	dialTimeout = 30 * time.Second
	// openTimeout bounds the opening of an export. It is long because a XenServer host
	// plugs the disk meanwhile, with a timeout of its own.
	openTimeout = 2 * time.Minute
	// maxURI bounds the size of a file with a URI: an export name of 4096 bytes, each
	// percent-encoded, and a query.
	maxURI = 32 << 10
	// defaultTimeout is how long a server may make no progress.
	defaultTimeout = time.Minute
)

// connectFlags are the flags of every command that connects.
type connectFlags struct {
	timeout  time.Duration
	ca       string
	dir      string // --tls-certificates
	hostname string
	insecure bool
}

func (f *connectFlags) bind(flags *pflag.FlagSet) {
	flags.DurationVar(&f.timeout, "timeout", defaultTimeout, "`DURATION` without a byte sent or received after which a request has failed; ten times as long for flushing, zeroing and trimming; 0 is no limit")
	flags.Lookup("timeout").DefValue = strings.TrimSuffix(defaultTimeout.String(), "0s") // help says 1m
	flags.StringVar(&f.ca, "tls-ca", "", "trust the certificates in this PEM `FILE`, instead of those of the system or the URI")
	flags.StringVar(&f.dir, "tls-certificates", "", "`DIR` with ca-cert.pem and, if the server asks for one, client-cert.pem and client-key.pem")
	flags.StringVar(&f.hostname, "tls-hostname", "", "`NAME` that the server's certificate is for, if not the host's")
	flags.BoolVar(&f.insecure, "tls-insecure", false, "encrypt, but accept any certificate")
}

// check returns a usage error for invalid values.
func (f *connectFlags) check() error {
	if f.timeout < 0 {
		return usagef("--timeout must be 0 or more, such as 60s")
	}
	return nil
}

// aboutTLS reports whether a flag that needs TLS is given.
func (f *connectFlags) aboutTLS() bool {
	return f.ca != "" || f.dir != "" || f.hostname != "" || f.insecure
}

// withoutTLS returns the flags without those that need TLS.
func (f *connectFlags) withoutTLS() *connectFlags { return &connectFlags{timeout: f.timeout} }

var errNeedsTLS = usagef("--tls-ca, --tls-certificates, --tls-hostname and --tls-insecure need TLS: a URI that begins with nbds, or --host without --no-tls")

func bindURIFile(flags *pflag.FlagSet, name string, value *string, of string) {
	flags.StringVar(value, name, "", "read the URI"+of+" from `FILE`, or from standard input with -")
}

// target is a server or an export with the settings of its connections.
type target struct {
	uri     *client.URI
	tls     *tls.Config
	timeout time.Duration // without progress
}

// exportFlags are the flags that name an export of a server.
type exportFlags struct {
	connect connectFlags
	uriFile string
	host    hostFlags
}

func (f *exportFlags) bind(flags *pflag.FlagSet, of string) {
	bindURIFile(flags, "uri-file", &f.uriFile, of)
	f.host.bind(flags)
	f.connect.bind(flags)
}

// named reports whether flags name the export, in place of an argument.
func (f *exportFlags) named() bool { return f.uriFile != "" || f.host.given() }

// check returns a usage error for invalid flags and for those that contradict each other.
// nameless is true for a command that needs no export name.
func (f *exportFlags) check(nameless bool) error {
	if f.uriFile != "" && f.host.given() {
		return usagef("--uri-file and --host both name the server")
	}
	if err := f.host.check(nameless); err != nil {
		return err
	}
	return f.connect.check()
}

// uri returns the URI of the flags, or that of text if they name none.
func (f *exportFlags) uri(text string, in *secretInput) (*client.URI, error) {
	switch {
	case f.host.given():
		return f.host.uri(in)
	case f.uriFile != "":
		var err error
		if text, err = in.readLine(f.uriFile, "URI"); err != nil {
			return nil, err
		}
	}
	return in.parseURI(text)
}

// uriCommand completes a command that works on one export, given by a URI as argument or by
// flags. nameless is true if it needs no export name.
func uriCommand(cmd *cobra.Command, nameless bool, do func(cmd *cobra.Command, t *target) error) *cobra.Command {
	var flags exportFlags
	flags.bind(cmd.Flags(), "")
	cmd.Use += " [flags] {URI | --uri-file FILE | --host HOST --vdi UUID --session-file FILE}"
	if nameless {
		cmd.Use = strings.Replace(cmd.Use, " --vdi UUID --session-file FILE", "", 1)
	}
	cmd.DisableFlagsInUseLine = true
	cmd.ValidArgsFunction = cobra.NoFileCompletions
	cmd.Args = func(_ *cobra.Command, args []string) error {
		if flags.named() != (len(args) == 0) || len(args) > 1 {
			return usagef("want one URI, or --uri-file, or --host")
		}
		return flags.check(nameless)
	}
	cmd.RunE = action(func(cmd *cobra.Command, args []string) error {
		u, err := flags.uri(strings.Join(args, ""), newSecretInput(cmd))
		if err != nil {
			return err
		}
		t, err := flags.connect.target(u)
		if err != nil {
			return err
		}
		return do(cmd, t)
	})
	return cmd
}

// secretInput reads arguments, files and standard input that may hold secrets. It passes
// the secrets to the redacting writers, which replace them.
type secretInput struct {
	stdin   io.Reader
	secrets *secrets
}

func newSecretInput(cmd *cobra.Command) *secretInput {
	in := &secretInput{stdin: cmd.InOrStdin(), secrets: new(secrets)}
	if r, ok := cmd.ErrOrStderr().(redactor); ok {
		in.secrets = r.secrets
	}
	return in
}

// parseURI parses a URI, which may hold a session.
func (in *secretInput) parseURI(text string) (*client.URI, error) {
	in.secrets.add(text)
	u, err := client.ParseURI(text)
	if err != nil {
		return nil, usageError{err}
	}
	return u, nil
}

// readLine returns the only line of a file that is not empty. kind names the content in
// messages, which do not contain any of it.
func (in *secretInput) readLine(path, kind string) (string, error) {
	line, err := readLine(path, kind, in.stdin)
	in.secrets.add(line)
	return line, err
}

func readLine(path, kind string, stdin io.Reader) (string, error) {
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
			return "", usagef("%s holds more than one line", fileName(path))
		}
		found += line
	}
	if err := lines.Err(); err != nil {
		return "", fmt.Errorf("reading the %s from %s: %w", kind, fileName(path), err)
	}
	if found == "" {
		return "", usagef("%s holds no %s", fileName(path), kind)
	}
	return found, nil
}

func fileName(path string) string {
	if path == "-" {
		return "standard input"
	}
	return path
}

// target returns the target of a URI with the settings of the flags.
func (f *connectFlags) target(u *client.URI) (*target, error) {
	t := &target{uri: u, timeout: f.timeout}
	if !u.TLS {
		if f.aboutTLS() {
			return nil, errNeedsTLS
		}
		return t, nil
	}
	var err error
	t.tls, err = f.tlsConfig(u)
	return t, err
}

// tlsConfig returns the TLS configuration that the URI asks for, with the flags in place of
// its parameters.
func (f *connectFlags) tlsConfig(u *client.URI) (*tls.Config, error) {
	if f.ca != "" && f.insecure {
		return nil, usagef("--tls-ca and --tls-insecure contradict each other")
	}
	effective := *u
	effective.TLSHostname = cmp.Or(f.hostname, u.TLSHostname)
	effective.TLSCertificates = cmp.Or(f.dir, u.TLSCertificates)
	if f.insecure || f.ca != "" {
		effective.TLSVerifyPeer = new(bool) // with --tls-ca, do not read ca-cert.pem
	}
	cfg, err := effective.TLSConfig()
	switch {
	case errors.Is(err, errors.ErrUnsupported):
		return nil, usagef("%v", err)
	case err != nil || f.ca == "":
		return cfg, err
	}
	cfg.InsecureSkipVerify = false
	cfg.RootCAs, err = readCertificates(f.ca)
	return cfg, err
}

// readCertificates reads the certificates of a PEM file.
func readCertificates(path string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate", path)
	}
	return pool, nil
}

// dial connects and makes a client. The caller ends the client.
func (t *target) dial(ctx context.Context, contexts ...string) (*client.Client, error) {
	ctx, cancel := within(ctx, dialTimeout)
	defer cancel()
	c, err := client.Dial(ctx, t.uri.Network, t.uri.Addr, &client.Config{
		TLSConfig: t.tls, MetaContexts: contexts, ProgressTimeout: t.timeout,
	})
	if err != nil {
		return nil, t.explain(err)
	}
	return c, nil
}

// open connects and opens the export. The caller closes the connection.
func (t *target) open(ctx context.Context, contexts ...string) (*client.Conn, error) {
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
func (t *target) goOn(ctx context.Context, c *client.Client) (*client.Conn, error) {
	ctx, cancel := within(ctx, openTimeout)
	defer cancel()
	conn, err := c.Go(ctx, t.uri.Export)
	if err != nil {
		return nil, t.explain(err)
	}
	return conn, nil
}

// within bounds an exchange with a server. The cause of the context names the limit.
func within(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, limit, fmt.Errorf("gave up after %v: %w", limit, context.DeadlineExceeded))
}
