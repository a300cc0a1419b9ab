package testcert_test

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"

	"xapi-nbd/internal/testcert"
)

// verify returns the error with which a client refuses a server's certificate.
func verify(server, client *tls.Config) error {
	leaf, err := x509.ParseCertificate(server.Certificates[0].Certificate[0])
	if err != nil {
		return err
	}
	_, err = leaf.Verify(x509.VerifyOptions{DNSName: client.ServerName, Roots: client.RootCAs})
	return err
}

// TestSelfSigned verifies a certificate with and without trust, by every name, at the real time and at
// the fake time of testing/synctest.
func TestSelfSigned(t *testing.T) {
	cert, other := testcert.SelfSigned("nbd.test", "127.0.0.1"), testcert.SelfSigned("nbd.test")
	check := func(t *testing.T) {
		for _, name := range []string{"nbd.test", "127.0.0.1"} {
			if err := verify(cert.ServerConfig(), cert.ClientConfig(name)); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if err := verify(cert.ServerConfig(), cert.ClientConfig("other.test")); err == nil {
			t.Error("a name that is not in the certificate was accepted")
		}
		if err := verify(cert.ServerConfig(), other.ClientConfig("nbd.test")); err == nil {
			t.Error("a certificate that is not trusted was accepted")
		}
	}
	check(t)
	synctest.Test(t, check)
}

// TestIssued writes a certificate that a CA signed to files, and verifies it from them.
func TestIssued(t *testing.T) {
	ca := testcert.Sign(&x509.Certificate{
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, nil, nil)
	cert := testcert.Sign(testcert.Server("nbd.test"), nil, ca)
	dir := filepath.Join(t.TempDir(), "new")
	if err := cert.WriteFolder(dir, "server", ca); err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "server-cert.pem"), filepath.Join(dir, "server-key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if text, err := os.ReadFile(filepath.Join(dir, "ca-cert.pem")); err != nil || !roots.AppendCertsFromPEM(text) {
		t.Fatalf("ca-cert.pem: %v", err)
	}
	server := &tls.Config{Certificates: []tls.Certificate{pair}}
	if err := verify(server, &tls.Config{RootCAs: roots, ServerName: "nbd.test"}); err != nil {
		t.Error(err)
	}
	path := filepath.Join(t.TempDir(), "pair.pem")
	if err := cert.WriteServerFile(path); err != nil {
		t.Fatal(err)
	}
	if _, err := tls.LoadX509KeyPair(path, path); err != nil {
		t.Errorf("certificate and key in one file: %v", err)
	}
}
