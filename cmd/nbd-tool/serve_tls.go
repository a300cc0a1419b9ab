package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"sync/atomic"

	"xapi-nbd/nbd"
	nbdtls "xapi-nbd/tls"
)

// currentTLS has the requirements of a server that can be replaced by others.
type currentTLS struct{ current atomic.Pointer[requirements] }

// requirements are what clients need. They are immutable.
type requirements struct {
	tls     *tls.Config    // nil: no TLS
	issuers *x509.CertPool // of the certificates of clients; nil: clients need none
}

// policy is an nbd.Server's TLSPolicy.
func (s *currentTLS) policy(context.Context, nbd.Peer) (nbd.TLSMode, error) {
	if s.current.Load().tls == nil {
		return nbd.NoTLS, nil
	}
	return nbd.ForcedTLS, nil
}

// config returns an nbd.Server's TLSConfig, which uses the current certificates for each
// handshake.
func (s *currentTLS) config() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			c := s.current.Load().tls
			if c == nil {
				return nil, errors.New("TLS has just been switched off")
			}
			return c.GetConfigForClient(hello)
		},
	}
}

// admit returns a refusal for a client that does not meet the current requirements. Its
// handshake began when there were other ones: the mode of a connection does not change, so
// NBD_REP_ERR_TLS_REQD is not for it.
func (s *currentTLS) admit(peer nbd.Peer) error {
	now := s.current.Load()
	switch {
	case now.tls == nil:
		return nil
	case peer.TLS == nil:
		return nbd.Refuse(nbd.ErrPolicy, "TLS is required now: connect again with TLS", nil)
	case now.issuers == nil:
		return nil
	case len(peer.TLS.PeerCertificates) == 0:
		return nbd.Refuse(nbd.ErrPolicy, "a certificate of the client is required now: connect again with one", nil)
	}
	if err := issuedBy(now.issuers, peer.TLS.PeerCertificates); err != nil {
		return nbd.Refuse(nbd.ErrPolicy, "the certificate of the client is not accepted any more", err)
	}
	return nil
}

// issuedBy verifies the certificates of a client, its own first, as crypto/tls does in a
// handshake.
func issuedBy(issuers *x509.CertPool, chain []*x509.Certificate) error {
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{
		Roots: issuers, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	return err
}

// readRequirements returns the requirements for a certfile and a cafile, each of which may be
// "": no TLS without a certfile. The certificate is read again when its file changes, the
// certificates of cafile only once.
func readRequirements(certfile, cafile string, log *slog.Logger) (*requirements, error) {
	if certfile == "" {
		return new(requirements), nil
	}
	r, err := nbdtls.NewReloader(certfile, log)
	if err != nil {
		return nil, err
	}
	cfg := nbdtls.ServerConfig(r)
	if cafile == "" {
		return &requirements{tls: cfg}, nil
	}
	issuers, err := readCertificates(cafile)
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
	return &requirements{tls: cfg, issuers: issuers}, nil
}
