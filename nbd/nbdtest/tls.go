package nbdtest

import (
	"crypto/tls"
	"testing"

	"xapi-nbd/internal/testcert"
)

// ServerName is the name in the certificates that [TLS] makes.
const ServerName = "nbd.test"

// TLS makes a self-signed certificate for [ServerName] and 127.0.0.1, and returns the
// configurations of a server that presents it and of a client that trusts it. The caller
// may change them. The certificate is valid in the fake time of testing/synctest too.
func TLS(t testing.TB) (server, client *tls.Config) {
	t.Helper()
	cert := testcert.SelfSigned(ServerName, "127.0.0.1")
	return cert.ServerConfig(), cert.ClientConfig(ServerName)
}
