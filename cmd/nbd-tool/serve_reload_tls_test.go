package main

import (
	"crypto/tls"
	"path/filepath"
	"strings"
	"testing"

	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/nbdtest"
)

// dial connects a client that does not name an export yet.
func (r *reloadable) dial(cfg *tls.Config) *client.Client {
	r.t.Helper()
	c, err := client.Dial(r.t.Context(), "tcp", r.addr, &client.Config{TLSConfig: cfg})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Abort() })
	return c
}

// wantRefused expects that a client cannot open export a, nor describe or list exports.
func (r *reloadable) wantRefused(who string, c *client.Client, want string) {
	r.t.Helper()
	conn, err := c.Go(r.t.Context(), "a") // first of all: INFO may have opened it
	if err == nil || !strings.Contains(err.Error(), want) {
		r.t.Errorf("%s: opening: got error %v, want %q", who, err, want)
	}
	if err == nil {
		conn.Close()
	}
	if list, err := c.List(r.t.Context()); err == nil || !strings.Contains(err.Error(), want) {
		r.t.Errorf("%s: list: got %v, %v, want an error with %q", who, list, err, want)
	}
	if info, err := c.Info(r.t.Context(), "b"); err == nil || !strings.Contains(err.Error(), want) {
		r.t.Errorf("%s: info: got %v, %v, want an error with %q", who, info, err, want)
	}
}

// withInfo makes the server open export a for a client in the handshake.
func withInfo(t *testing.T, c *client.Client) *client.Client {
	t.Helper()
	if _, err := c.Info(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	return c
}

// TestServeReloadRequirements: what a reload requires of clients holds for those that are in the
// handshake already, also if NBD_OPT_INFO has opened the export for them.
func TestServeReloadRequirements(t *testing.T) {
	r := startReloadable(t, []string{"a", "b"}, reloadListen+reloadA+reloadB)
	serverTLS, clientTLS := nbdtest.TLS(t)
	caDir, pair := certificateFiles(t, serverTLS)
	firstIssuer, first := clientCertificate(t, filepath.Join(caDir, "ca-cert.pem"))
	secondIssuer, second := clientCertificate(t, filepath.Join(caDir, "ca-cert.pem"))
	as := func(dir string) *tls.Config {
		cert, err := tls.LoadX509KeyPair(filepath.Join(dir, "client-cert.pem"), filepath.Join(dir, "client-key.pem"))
		if err != nil {
			t.Fatal(err)
		}
		cfg := clientTLS.Clone()
		cfg.Certificates = []tls.Certificate{cert}
		return cfg
	}
	served := func(keys string) { r.reload(reloadListen + keys + reloadA + reloadB) }
	withTLS := "certfile = '" + pair + "'\n"

	fresh, informed := r.dial(nil), withInfo(t, r.dial(nil))
	served(withTLS)
	const needsTLS = "TLS is required now"
	r.wantRefused("in the clear", fresh, needsTLS)
	r.wantRefused("in the clear, after INFO", informed, needsTLS)

	fresh, informed = r.dial(clientTLS), withInfo(t, r.dial(clientTLS))
	served(withTLS + "cafile = '" + firstIssuer + "'\n")
	const needsCertificate = "a certificate of the client is required now"
	r.wantRefused("without a certificate", fresh, needsCertificate)
	r.wantRefused("without a certificate, after INFO", informed, needsCertificate)

	fresh, informed = r.dial(as(first)), withInfo(t, r.dial(as(first)))
	served(withTLS + "cafile = '" + secondIssuer + "'\n")
	const other = "the certificate of the client is not accepted any more"
	r.wantRefused("with the certificate of before", fresh, other)
	r.wantRefused("with the certificate of before, after INFO", informed, other)

	// Clients that meet the new requirements, or need not meet any, go on.
	for keys, c := range map[string]*client.Client{
		withTLS + "cafile = '" + secondIssuer + "'\n": withInfo(t, r.dial(as(second))),
		"": withInfo(t, r.dial(as(second))),
	} {
		served(keys)
		conn, err := c.Go(t.Context(), "a")
		if err != nil {
			t.Fatalf("%q: %v", keys, err)
		}
		r.wantRead("a", conn, diskContent(0))
		conn.Close()
	}
}
