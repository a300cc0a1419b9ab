package client

import (
	"crypto/tls"
	"net"
	"sync"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
)

// patternSeed is the seed of the content of all exports in these tests.
const patternSeed = 1

// patternOf returns the n bytes that every export of these tests has at off.
func patternOf(off int64, n int) []byte { return nbdtest.Bytes(n, off, patternSeed) }

// newMem returns a device that holds the pattern.
func newMem(size int64) *nbdtest.Mem { return nbdtest.NewMem(size, patternSeed) }

// connectTo returns a connection to a server that serves one connection and has one
// export, d. At the end of the test d must have been closed once and used correctly.
func connectTo(t testing.TB, d nbd.Device) net.Conn {
	t.Helper()
	exports := nbdtest.Single("a", d)
	t.Cleanup(func() { checkUse(t, exports) })
	nc, _ := nbdtest.Pipe(t, &nbd.Server{Exporter: exports})
	return nc
}

// checkUse checks that every device that was opened was closed once and used correctly.
func checkUse(t testing.TB, exports *nbdtest.Exporter) {
	t.Helper()
	for _, o := range exports.Opens() {
		d, ok := o.Device.(interface {
			Closes() int
			Misuse() error
		})
		if ok && (d.Closes() != 1 || d.Misuse() != nil) {
			t.Errorf("the device was closed %d times, want once; misuse: %v", d.Closes(), d.Misuse())
		}
	}
}

var testTLS struct {
	once           sync.Once
	server, client *tls.Config
}

// tlsConfigs returns the configurations of a server and of a client that trusts it. The
// server sends no session tickets: over net.Pipe a client that does not read them would
// keep the server from reading.
func tlsConfigs(t testing.TB) (server, client *tls.Config) {
	testTLS.once.Do(func() {
		testTLS.server, testTLS.client = nbdtest.TLS(t)
		testTLS.server.SessionTicketsDisabled = true
	})
	return testTLS.server.Clone(), testTLS.client.Clone()
}

func serverTLS(t testing.TB) *tls.Config {
	server, _ := tlsConfigs(t)
	return server
}

func clientTLS(t testing.TB) *tls.Config {
	_, client := tlsConfigs(t)
	return client
}
