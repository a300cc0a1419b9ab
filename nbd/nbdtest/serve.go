package nbdtest

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"xapi-nbd/nbd"
)

// peerTimeout is how long this package waits for a peer before the test fails. It only
// matters to tests that fail.
const peerTimeout = time.Minute

// Serve runs s on a loopback port until the end of the test. Then it calls Shutdown, and the
// test fails if connections are left. dial connects to the server; the connections are
// closed at the end of the test.
func Serve(t testing.TB, s *nbd.Server) (dial func() net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	// Not the test's context: that one ends before the cleanups.
	ctx := context.WithoutCancel(t.Context())
	go func() { served <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(ctx, peerTimeout)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Errorf("Shutdown: got error %v, want none", err)
		}
		if err := <-served; !errors.Is(err, nbd.ErrServerClosed) {
			t.Errorf("Serve returned %v, want ErrServerClosed", err)
		}
	})
	return func() net.Conn {
		t.Helper()
		var d net.Dialer
		nc, err := d.DialContext(ctx, "tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { nc.Close() })
		return nc
	}
}

// Pipe has s serve one connection in memory. wait returns the result of ServeConn, and may be
// called again; it is also called at the end of the test, after the client's end has been
// closed.
func Pipe(t testing.TB, s *nbd.Server) (client net.Conn, wait func() error) {
	t.Helper()
	client, server := net.Pipe()
	return client, ServeConn(t, s, client, server)
}

// ServeConn is Pipe with a given pair of connections.
func ServeConn(t testing.TB, s *nbd.Server, client, server net.Conn) (wait func() error) {
	ctx := context.WithoutCancel(t.Context())
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		err = s.ServeConn(ctx, server)
	}()
	wait = func() error {
		<-done
		return err
	}
	t.Cleanup(func() {
		client.Close()
		wait()
	})
	return wait
}
