// Package testcert makes certificates for tests, benchmarks and the demo: self-signed
// ones, and ones that an issuer signs. Keys are ECDSA P-256 unless the caller has a key.
//
// Its functions panic where crypto/x509 refuses the caller's template or key: that is a
// mistake in the calling test, which no test can handle.
package testcert

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// The default validity includes the year 2000, in which tests under testing/synctest run.
var (
	notBefore = time.Date(1990, 1, 1, 0, 0, 0, 0, time.UTC)
	notAfter  = time.Date(2190, 1, 1, 0, 0, 0, 0, time.UTC)
)

// Cert is a certificate with its private key.
type Cert struct {
	*x509.Certificate
	Key crypto.Signer
}

// SelfSigned makes a self-signed server certificate for host names and IP addresses. It
// is also a CA certificate, because QEMU and libnbd trust no other.
func SelfSigned(hosts ...string) *Cert { return Sign(Server(hosts...), nil, nil) }

// Server returns the template of a certificate that a server presents for host names and
// IP addresses; the first one is its common name.
func Server(hosts ...string) *x509.Certificate {
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: hosts[0]},
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IsCA:        true, BasicConstraintsValid: true,
	}
	for _, host := range hosts {
		if ip := net.ParseIP(host); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, host)
		}
	}
	return template
}

// Sign makes a certificate of a template. A nil key means a new one; a nil issuer means
// that the certificate signs itself. A serial number or a validity that the template lacks
// is filled in, in the template too.
func Sign(template *x509.Certificate, key crypto.Signer, issuer *Cert) *Cert {
	if key == nil {
		key = must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	}
	if template.SerialNumber == nil {
		template.SerialNumber = big.NewInt(1)
		if issuer != nil {
			template.SerialNumber = big.NewInt(2)
		}
	}
	if template.NotAfter.IsZero() {
		template.NotBefore, template.NotAfter = notBefore, notAfter
	}
	if issuer == nil {
		issuer = &Cert{template, key}
	}
	der := must(x509.CreateCertificate(rand.Reader, template, issuer.Certificate, key.Public(), issuer.Key))
	return &Cert{must(x509.ParseCertificate(der)), key}
}

// PEM returns the certificate in PEM.
func (c *Cert) PEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

// KeyPEM returns the private key in PKCS #8 and PEM.
func (c *Cert) KeyPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: must(x509.MarshalPKCS8PrivateKey(c.Key))})
}

// PairPEM returns the private key and then the certificate, the order of xapi's file.
func (c *Cert) PairPEM() []byte { return append(c.KeyPEM(), c.PEM()...) }

// ServerConfig returns the configuration of a server that presents the certificate. The
// caller may change it.
func (c *Cert) ServerConfig() *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS12,
		Certificates: []tls.Certificate{{Certificate: [][]byte{c.Raw}, PrivateKey: c.Key, Leaf: c.Certificate}},
	}
}

// ClientConfig returns the configuration of a client that trusts the certificate, and no
// other, and expects a server of that name. The caller may change it.
func (c *Cert) ClientConfig(serverName string) *tls.Config {
	roots := x509.NewCertPool()
	roots.AddCert(c.Certificate)
	return &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots, ServerName: serverName}
}

// WriteServerFile writes the certificate with its private key to a file, as xapi does.
func (c *Cert) WriteServerFile(path string) error { return os.WriteFile(path, c.PairPEM(), 0o400) }

// WriteCA writes the certificate into the folder dir under the name by which libnbd, QEMU
// and nbdkit look for the CAs that they trust. It makes the folder if need be.
func (c *Cert) WriteCA(dir string) error {
	return errors.Join(
		os.MkdirAll(dir, 0o755),
		os.WriteFile(filepath.Join(dir, "ca-cert.pem"), c.PEM(), 0o444),
	)
}

// WriteFolder writes the certificate and its private key into the folder dir, beside the
// certificate of the CA to be trusted, under the names that libnbd, QEMU and nbdkit give
// them; role is "server" or "client". It makes the folder if need be.
func (c *Cert) WriteFolder(dir, role string, ca *Cert) error {
	return errors.Join(
		ca.WriteCA(dir),
		os.WriteFile(filepath.Join(dir, role+"-cert.pem"), c.PEM(), 0o644),
		os.WriteFile(filepath.Join(dir, role+"-key.pem"), c.KeyPEM(), 0o600),
	)
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
