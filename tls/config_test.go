package tls

import (
	"crypto"
	cryptotls "crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"testing"
)

// handshake makes a TLS handshake over a pipe, sends a byte in each direction, and returns
// the client's state.
func handshake(t *testing.T, server, client *cryptotls.Config) (cryptotls.ConnectionState, error) {
	t.Helper()
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	served := make(chan error, 1)
	go func() {
		conn := cryptotls.Server(a, server)
		_, err := io.CopyN(conn, conn, 1)
		a.Close()
		served <- err
	}()
	conn := cryptotls.Client(b, client)
	err := conn.HandshakeContext(t.Context())
	if err == nil {
		if _, err = conn.Write([]byte{42}); err == nil {
			_, err = io.ReadFull(conn, make([]byte, 1))
		}
	}
	b.Close()
	if serverErr := <-served; err == nil && serverErr != nil {
		t.Errorf("the client succeeds, the server fails with %v", serverErr)
	}
	return conn.ConnectionState(), err
}

func reloaderFor(t *testing.T, key crypto.Signer) (*Reloader, *x509.CertPool) {
	t.Helper()
	leaf := validCert(key, "host")
	r, err := NewReloader(writeFile(t, join(pkcs8(t, key), leaf)), nil)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(leaf) {
		t.Fatal("no certificate to trust")
	}
	return r, roots
}

func TestServerConfigTLS12(t *testing.T) {
	tests := []struct {
		name  string
		key   crypto.Signer
		suite uint16
		curve cryptotls.CurveID
	}{
		{"RSA AES-256 P-384", rsaKey(), cryptotls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, cryptotls.CurveP384},
		{"RSA AES-128 P-256", rsaKey(), cryptotls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, cryptotls.CurveP256},
		{"ECDSA AES-256 X25519", ecKey(), cryptotls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, cryptotls.X25519},
		{"ECDSA AES-128 P-384", ecKey(), cryptotls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, cryptotls.CurveP384},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r, roots := reloaderFor(t, tt.key)
			state, err := handshake(t, ServerConfig(r), &cryptotls.Config{
				RootCAs: roots, ServerName: "host", MaxVersion: cryptotls.VersionTLS12,
				CipherSuites: []uint16{tt.suite}, CurvePreferences: []cryptotls.CurveID{tt.curve},
			})
			if err != nil {
				t.Fatalf("handshake: %v", err)
			}
			if state.Version != cryptotls.VersionTLS12 || state.CipherSuite != tt.suite || state.CurveID != tt.curve {
				t.Errorf("got %s %s %s, want TLS 1.2 %s %s", cryptotls.VersionName(state.Version),
					cryptotls.CipherSuiteName(state.CipherSuite), state.CurveID, cryptotls.CipherSuiteName(tt.suite), tt.curve)
			}
		})
	}
}

func TestServerConfigTLS13(t *testing.T) {
	for name, key := range map[string]crypto.Signer{"RSA": rsaKey(), "ECDSA": ecKey()} {
		t.Run(name, func(t *testing.T) {
			r, roots := reloaderFor(t, key)
			state, err := handshake(t, ServerConfig(r), &cryptotls.Config{RootCAs: roots, ServerName: "host"})
			if err != nil {
				t.Fatalf("handshake: %v", err)
			}
			if state.Version != cryptotls.VersionTLS13 {
				t.Errorf("got %s, want TLS 1.3", cryptotls.VersionName(state.Version))
			}
		})
	}
}

func TestServerConfigRefuses(t *testing.T) {
	tests := []struct {
		name   string
		client *cryptotls.Config
	}{
		{"TLS 1.1", &cryptotls.Config{MinVersion: cryptotls.VersionTLS10, MaxVersion: cryptotls.VersionTLS11}},
		{"CBC", &cryptotls.Config{MaxVersion: cryptotls.VersionTLS12, CipherSuites: []uint16{cryptotls.TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA}}},
		{"no forward secrecy", &cryptotls.Config{MaxVersion: cryptotls.VersionTLS12, CipherSuites: []uint16{cryptotls.TLS_RSA_WITH_AES_256_GCM_SHA384}}},
		{"only P-521", &cryptotls.Config{CurvePreferences: []cryptotls.CurveID{cryptotls.CurveP521}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r, roots := reloaderFor(t, rsaKey())
			tt.client.RootCAs, tt.client.ServerName = roots, "host"
			if state, err := handshake(t, ServerConfig(r), tt.client); err == nil {
				t.Errorf("got %s, want a refusal", cryptotls.CipherSuiteName(state.CipherSuite))
			}
		})
	}
}

// TestServerConfigServesRenewal: a client can resume a session until the certificate is
// renewed; then it sees the new certificate.
func TestServerConfigServesRenewal(t *testing.T) {
	for _, version := range []uint16{cryptotls.VersionTLS12, cryptotls.VersionTLS13} {
		t.Run(cryptotls.VersionName(version), func(t *testing.T) {
			key := pkcs8(t, rsaKey())
			path := writeFile(t, join(key, validCert(rsaKey(), "old")))
			r, err := NewReloader(path, nil)
			if err != nil {
				t.Fatal(err)
			}
			server := ServerConfig(r)
			client := &cryptotls.Config{
				InsecureSkipVerify: true, ServerName: "host", MaxVersion: version, // the leaf is compared below
				ClientSessionCache: cryptotls.NewLRUClientSessionCache(1),
			}
			for i, want := range []string{"old", "old", "new", "new"} {
				if i == 2 {
					replace(t, path, join(key, validCert(rsaKey(), "new")))
				}
				state, err := handshake(t, server, client)
				if err != nil {
					t.Fatalf("%s: %v", want, err)
				}
				if resumed := i%2 == 1; state.DidResume != resumed {
					t.Errorf("%s, handshake %d: resumed %t, want %t", want, i+1, state.DidResume, resumed)
				}
				if got := state.PeerCertificates[0].Subject.CommonName; got != want {
					t.Errorf("got certificate %q, want %q", got, want)
				}
			}
		})
	}
}

func TestServerConfigWithoutCertificate(t *testing.T) {
	r, err := NewReloader(t.TempDir()+"/missing", nil)
	if err == nil {
		t.Error("NewReloader: got no error for a missing file")
	}
	if _, err := handshake(t, ServerConfig(r), &cryptotls.Config{InsecureSkipVerify: true}); err == nil {
		t.Error("handshake: got no error without a certificate")
	}
}
