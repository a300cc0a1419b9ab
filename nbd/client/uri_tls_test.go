package client_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io/fs"
	"testing"

	"xapi-nbd/internal/testcert"
	"xapi-nbd/nbd"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/nbdtest"
)

// TestDialURI has a server that requires TLS and a certificate of the client.
func TestDialURI(t *testing.T) {
	ca := testcert.Sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: "test CA"},
		IsCA:    true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, nil, nil)
	template := testcert.Server(nbdtest.ServerName)
	template.IsCA, template.ExtKeyUsage = false, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	cert := testcert.Sign(template, nil, ca)
	withCert, without := t.TempDir(), t.TempDir()
	if err := errors.Join(cert.WriteFolder(withCert, "client", ca), ca.WriteCA(without)); err != nil {
		t.Fatal(err)
	}
	cfg := cert.ServerConfig()
	cfg.ClientAuth, cfg.ClientCAs = tls.RequireAndVerifyClientCert, x509.NewCertPool()
	cfg.ClientCAs.AddCert(ca.Certificate)
	dial := nbdtest.Serve(t, &nbd.Server{
		Exporter: nbdtest.Single("x", nbdtest.NewMem(4096, 1)), TLSConfig: cfg,
		TLSPolicy: func(context.Context, nbd.Peer) (nbd.TLSMode, error) { return nbd.ForcedTLS, nil },
	})
	addr := dial().RemoteAddr().String()
	const name = "&tls-hostname=" + nbdtest.ServerName
	tests := []struct {
		name, uri string
		cfg       *client.Config
		ok        bool
		check     func(error) bool // nil: any error
	}{
		{name: "certificate", uri: "nbds://" + addr + "/x?tls-certificates=" + withCert + name, ok: true},
		{name: "not verified", uri: "nbds://" + addr + "/x?tls-verify-peer=0&tls-certificates=" + withCert, ok: true},
		{name: "no certificate", uri: "nbds://" + addr + "/x?tls-certificates=" + without + name},
		{name: "other name", uri: "nbds://" + addr + "/x?tls-certificates=" + withCert, check: func(err error) bool {
			var host x509.HostnameError
			return errors.As(err, &host)
		}},
		{name: "CA of the system", uri: "nbds://" + addr + "/x?" + name[1:], check: func(err error) bool {
			var unknown x509.UnknownAuthorityError
			return errors.As(err, &unknown)
		}},
		{name: "no folder", uri: "nbds://" + addr + "/x?tls-certificates=/nonexistent", check: func(err error) bool { return errors.Is(err, fs.ErrNotExist) }},
		{name: "pre-shared key", uri: "nbds://" + addr + "/x?tls-type=psk", check: func(err error) bool { return errors.Is(err, errors.ErrUnsupported) }},
		{name: "no TLS", uri: "nbd://" + addr + "/x"},
		{name: "configuration against the URI", uri: "nbd://" + addr + "/x", cfg: &client.Config{TLSConfig: new(tls.Config)}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			u, err := client.ParseURI(tt.uri)
			if err != nil {
				t.Fatal(err)
			}
			c, err := client.DialURI(t.Context(), u, tt.cfg)
			if err == nil {
				defer c.Abort()
				_, err = c.Info(t.Context(), u.Export)
			}
			if (err == nil) != tt.ok || tt.check != nil && !tt.check(err) {
				t.Errorf("got error %v", err)
			}
		})
	}
}

// TestURITLSName: the name to verify does not contain a port or a zone.
func TestURITLSName(t *testing.T) {
	for uri, want := range map[string]string{
		"nbds://host:1234/x": "host", "nbds://[fe80::1%25eth0]/x": "fe80::1", "nbds+unix:///x?socket=/s": "localhost",
		"nbds://host/x?tls-hostname=other": "other", "nbd://host/x": "",
	} {
		u, err := client.ParseURI(uri)
		if err != nil {
			t.Fatal(err)
		}
		cfg, err := u.TLSConfig()
		switch {
		case err != nil:
			t.Errorf("%s: %v", uri, err)
		case (cfg == nil) != (want == ""), cfg != nil && cfg.ServerName != want:
			t.Errorf("%s: got %+v, want the name %q", uri, cfg, want)
		}
	}
}
