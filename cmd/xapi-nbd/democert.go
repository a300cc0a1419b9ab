package main

import (
	"crypto/tls"
	"errors"
	"path/filepath"
	"time"

	"xapi-nbd/internal/testcert"
)

// demoCertificate is a certificate made for one demo, as the service and its
// clients want it.
type demoCertificate struct {
	serverFile string      // key and certificate in one PEM, key first, as xapi writes it
	clientDir  string      // ca-cert.pem, where libnbd and qemu look for it
	client     *tls.Config // trusts it and nothing else
}

func newDemoCertificate(dir string) (*demoCertificate, error) {
	template := testcert.Server("localhost", "127.0.0.1", "::1")
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	cert := testcert.Sign(template, nil, nil)
	c := &demoCertificate{
		serverFile: filepath.Join(dir, "xapi-ssl.pem"),
		clientDir:  filepath.Join(dir, "trust"),
		client:     cert.ClientConfig("localhost"),
	}
	return c, errors.Join(cert.WriteServerFile(c.serverFile), cert.WriteCA(c.clientDir))
}
