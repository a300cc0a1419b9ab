package testcert

import (
	"crypto/tls"
	"errors"
	"path/filepath"
	"time"
)

// Files are a certificate for localhost in the files that the service and its clients read.
type Files struct {
	Server    string      // path: key and certificate in one PEM, key first, as xapi writes it
	ClientDir string      // path of the folder with ca-cert.pem, where libnbd and qemu look for it
	Client    *tls.Config // trusts the certificate and nothing else
}

// NewFiles makes a certificate that is valid for a day and writes its files below dir.
func NewFiles(dir string) (*Files, error) {
	template := Server("localhost", "127.0.0.1", "::1")
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	cert := Sign(template, nil, nil)
	f := &Files{
		Server:    filepath.Join(dir, "xapi-ssl.pem"),
		ClientDir: filepath.Join(dir, "trust"),
		Client:    cert.ClientConfig("localhost"),
	}
	return f, errors.Join(cert.WriteServerFile(f.Server), cert.WriteCA(f.ClientDir))
}
