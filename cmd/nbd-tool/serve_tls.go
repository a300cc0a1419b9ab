package main

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"sync/atomic"

	"xapi-nbd/nbd"
	nbdtls "xapi-nbd/tls"
)

// currentTLS is the TLS of a server whose certificate files can be replaced by others.
type currentTLS struct{ current atomic.Pointer[tls.Config] } // nil: no TLS

// policy is an nbd.Server's TLSPolicy.
func (s *currentTLS) policy(context.Context, nbd.Peer) (nbd.TLSMode, error) {
	if s.current.Load() == nil {
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
			c := s.current.Load()
			if c == nil {
				return nil, errors.New("TLS has just been switched off")
			}
			return c.GetConfigForClient(hello)
		},
	}
}

// tlsConfig returns the configuration for a certfile and a cafile, each of which may be "":
// nil without a certfile. The certificate is read again when its file changes, the
// certificates of cafile only once.
func tlsConfig(certfile, cafile string, log *slog.Logger) (*tls.Config, error) {
	if certfile == "" {
		return nil, nil
	}
	r, err := nbdtls.NewReloader(certfile, log)
	if err != nil {
		return nil, err
	}
	cfg := nbdtls.ServerConfig(r)
	if cafile == "" {
		return cfg, nil
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
	return cfg, nil
}
