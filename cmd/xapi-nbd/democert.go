package main

import (
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

// demoCertificate is a certificate made for one demo, as the service and its
// clients want it.
type demoCertificate struct {
	serverFile string      // key and certificate in one PEM, key first, as xapi writes it
	clientDir  string      // ca-cert.pem, where libnbd and qemu look for it
	client     *tls.Config // trusts it and nothing else
}

func newDemoCertificate(dir string) (*demoCertificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "localhost"},
		DNSNames:     []string{"localhost"},
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(24 * time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IsCA:         true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
	c := &demoCertificate{
		serverFile: filepath.Join(dir, "xapi-ssl.pem"),
		clientDir:  filepath.Join(dir, "trust"),
		client:     &tls.Config{RootCAs: x509.NewCertPool(), ServerName: "localhost"},
	}
	c.client.RootCAs.AddCert(cert)
	return c, errors.Join(
		os.WriteFile(c.serverFile, append(keyPEM, certPEM...), 0o400),
		os.Mkdir(c.clientDir, 0o755),
		os.WriteFile(filepath.Join(c.clientDir, "ca-cert.pem"), certPEM, 0o444),
	)
}
