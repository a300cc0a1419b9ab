package tls

import (
	"crypto/rand"
	cryptotls "crypto/tls"
	"sync"
	"time"
)

// ServerConfig returns the TLS policy of the service with r's certificate.
//
// It allows TLS 1.2 with the two suites of xapi's own policy (tls_policy.ml:
// ECDHE-RSA-AES256-GCM-SHA384 and ECDHE-RSA-AES128-GCM-SHA256) and the same ones with
// ECDSA, from which crypto/tls chooses by the certificate; and TLS 1.3, whose suites cannot
// be configured. On processors with AES instructions crypto/tls prefers AES-128-GCM, the
// cheapest there, and elsewhere ChaCha20. Xapi's policy has only the curve P-384; X25519
// and P-256 are added because clients prefer them and they cost the server much less.
//
// A client may resume a session while the certificate is the same, for a day at most: a
// resumed session shows no certificate, so after a renewal every client must see the new
// one. Records have their full size from the start, because data is sent in bulk. No client
// certificate is requested.
//
// The caller owns the result; results share only r.
func ServerConfig(r *Reloader) *cryptotls.Config {
	c := policy(r.GetCertificate)
	c.GetConfigForClient = (&resumption{reloader: r}).config
	return c
}

type getCertificate = func(*cryptotls.ClientHelloInfo) (*cryptotls.Certificate, error)

func policy(cert getCertificate) *cryptotls.Config {
	return &cryptotls.Config{
		GetCertificate: cert,
		MinVersion:     cryptotls.VersionTLS12,
		MaxVersion:     cryptotls.VersionTLS13,
		CipherSuites: []uint16{
			cryptotls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
			cryptotls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
			cryptotls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
			cryptotls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
		},
		CurvePreferences:            []cryptotls.CurveID{cryptotls.X25519, cryptotls.CurveP256, cryptotls.CurveP384},
		ClientAuth:                  cryptotls.NoClientCert,
		DynamicRecordSizingDisabled: true,
	}
}

// resumption makes new session ticket keys for every certificate, and every day.
type resumption struct {
	reloader *Reloader

	mu      sync.Mutex // guards the fields below
	cert    *cryptotls.Certificate
	current *cryptotls.Config
	since   time.Time
}

// ticketKeyLife is the time for which one key encrypts tickets. After it the key is gone,
// and recorded traffic cannot be decrypted with it.
const ticketKeyLife = 24 * time.Hour

// config is the crypto/tls.Config.GetConfigForClient of the service.
func (r *resumption) config(hello *cryptotls.ClientHelloInfo) (*cryptotls.Config, error) {
	cert, err := r.reloader.GetCertificate(hello)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if cert != r.cert || time.Since(r.since) > ticketKeyLife {
		c := policy(func(*cryptotls.ClientHelloInfo) (*cryptotls.Certificate, error) { return cert, nil })
		var key [32]byte
		_, _ = rand.Read(key[:]) // never fails
		c.SetSessionTicketKeys([][32]byte{key})
		r.cert, r.current, r.since = cert, c, time.Now()
	}
	return r.current, nil
}
