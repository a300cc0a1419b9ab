package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
)

// DialURI connects to the server of u as [Dial] does; the caller opens the export of the
// URI with [Client.Go]. If cfg has no TLSConfig, DialURI uses that of [URI.TLSConfig]. It
// fails if cfg has a TLSConfig and the URI does not ask for TLS.
func DialURI(ctx context.Context, u *URI, cfg *Config) (*Client, error) {
	var c Config
	if cfg != nil {
		c = *cfg
	}
	switch {
	case !u.TLS && c.TLSConfig != nil:
		return nil, fmt.Errorf("%w: TLS for %s, whose scheme is without TLS", errArgument, u.Server())
	case u.TLS && c.TLSConfig == nil:
		var err error
		if c.TLSConfig, err = u.TLSConfig(); err != nil {
			return nil, err
		}
	}
	return Dial(ctx, u.Network, u.Addr, &c)
}

// TLSConfig returns the TLS configuration that the URI asks for, or nil if it does not ask
// for TLS. The name to verify is TLSHostname, or the host, or localhost for a unix socket.
// If TLSCertificates is set, the server's certificate must be issued by ca-cert.pem in that
// folder, otherwise by a CA of the system; client-cert.pem and client-key.pem in the folder
// identify the client, if they exist. For a TLSType other than x509 the error matches
// [errors.ErrUnsupported].
func (u *URI) TLSConfig() (*tls.Config, error) {
	if !u.TLS {
		return nil, nil
	}
	if u.TLSType != "" && u.TLSType != "x509" {
		return nil, &tlsTypeError{u.TLSType}
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: u.tlsName()}
	cfg.InsecureSkipVerify = u.TLSVerifyPeer != nil && !*u.TLSVerifyPeer
	if u.TLSCertificates == "" {
		return cfg, nil
	}
	if !cfg.InsecureSkipVerify {
		path := filepath.Join(u.TLSCertificates, "ca-cert.pem")
		pem, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s holds no certificate", path)
		}
	}
	return cfg, loadClientCertificate(cfg, u.TLSCertificates)
}

// tlsTypeError is the error for a type of TLS that is not supported.
type tlsTypeError struct{ typ string }

func (e *tlsTypeError) Error() string {
	return fmt.Sprintf("tls-type=%s is not supported, only x509", e.typ)
}

// Unwrap makes it match errors.ErrUnsupported.
func (e *tlsTypeError) Unwrap() error { return errors.ErrUnsupported }

// tlsName returns the name to verify in the server's certificate.
func (u *URI) tlsName() string {
	if u.TLSHostname != "" {
		return u.TLSHostname
	}
	host, _, err := net.SplitHostPort(u.Addr)
	if u.Network != "tcp" || err != nil {
		return "localhost" // the server of a unix socket
	}
	name, _, _ := strings.Cut(host, "%") // certificates do not contain IPv6 zones
	return name
}

// loadClientCertificate loads the client's certificate from a folder, if it has one.
func loadClientCertificate(cfg *tls.Config, dir string) error {
	cert := filepath.Join(dir, "client-cert.pem")
	if _, err := os.Stat(cert); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	own, err := tls.LoadX509KeyPair(cert, filepath.Join(dir, "client-key.pem"))
	if err != nil {
		return fmt.Errorf("client certificate in %s: %w", dir, err)
	}
	cfg.Certificates = []tls.Certificate{own}
	return nil
}
