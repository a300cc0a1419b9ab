package tls

import cryptotls "crypto/tls"

// ServerConfig returns the TLS policy of the service with r's certificate.
//
// TLS 1.2 with the two suites of xapi's own policy (tls_policy.ml:
// ECDHE-RSA-AES256-GCM-SHA384 and ECDHE-RSA-AES128-GCM-SHA256) and their ECDSA
// twins, of which crypto/tls picks what fits the certificate; plus TLS 1.3,
// whose suites crypto/tls does not let anybody choose. Xapi's policy knows only
// the curve P-384; X25519 and P-256 are added because clients prefer them and
// they cost the server a fraction. The order in which crypto/tls picks among
// suites is its own.
//
// Session tickets are off: a resumed session shows no certificate, so a renewal
// would not reach the client, and an NBD connection lives long enough for one
// signature not to matter. No client certificate is asked for.
//
// The caller owns the result; it shares nothing with other results but r.
func ServerConfig(r *Reloader) *cryptotls.Config {
	return &cryptotls.Config{
		GetCertificate: r.GetCertificate,
		MinVersion:     cryptotls.VersionTLS12,
		MaxVersion:     cryptotls.VersionTLS13,
		CipherSuites: []uint16{
			cryptotls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
			cryptotls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
			cryptotls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
			cryptotls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
		},
		CurvePreferences:       []cryptotls.CurveID{cryptotls.X25519, cryptotls.CurveP256, cryptotls.CurveP384},
		ClientAuth:             cryptotls.NoClientCert,
		SessionTicketsDisabled: true,
	}
}
