package tls

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"xapi-nbd/internal/testcert"
)

// Making an RSA key takes a while, so the tests share one key of each kind.
var (
	rsaKey = sync.OnceValue(func() *rsa.PrivateKey {
		key, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			panic(err)
		}
		return key
	})
	ecKey = sync.OnceValue(func() *ecdsa.PrivateKey { return newECKey(elliptic.P256()) })
)

func newECKey(c elliptic.Curve) *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(c, rand.Reader)
	if err != nil {
		panic(err)
	}
	return key
}

// certFor returns a self-signed certificate for key, valid for the two hours
// up to notAfter.
func certFor(key crypto.Signer, name string, notAfter time.Time) []byte {
	template := testcert.Server(name)
	template.NotBefore, template.NotAfter = notAfter.Add(-2*time.Hour), notAfter
	return testcert.Sign(template, key, nil).PEM()
}

func validCert(key crypto.Signer, name string) []byte {
	return certFor(key, name, time.Now().Add(time.Hour))
}

func pemBlock(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func pkcs8(t testing.TB, key any) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pemBlock("PRIVATE KEY", der)
}

func sec1(t testing.TB, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pemBlock("EC PRIVATE KEY", der)
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, []byte("\n")) }

func writeFile(t testing.TB, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "xapi-ssl.pem")
	if err := os.WriteFile(path, data, 0o400); err != nil {
		t.Fatal(err)
	}
	return path
}

// replace replaces path as xapi does: it writes another file and renames it.
func replace(t testing.TB, path string, data []byte) {
	t.Helper()
	next := path + ".tmp"
	if err := os.WriteFile(next, data, 0o400); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, path); err != nil {
		t.Fatal(err)
	}
}
