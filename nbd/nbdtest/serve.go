package nbdtest

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"xapi-nbd/nbd"
)

// patience is how long anything here waits for a peer that does not answer
// before the test fails. It only matters to tests that fail.
const patience = time.Minute

// Serve runs s on a loopback port until the end of the test, when it is shut
// down and must have drained. dial connects to it and closes what it returned
// at the end of the test.
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
		ctx, cancel := context.WithTimeout(ctx, patience)
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

// Pipe lets s serve one connection in memory. wait returns what ServeConn
// returned, and may be called again; it is called at the end of the test at
// the latest, after the client's end was closed.
func Pipe(t testing.TB, s *nbd.Server) (client net.Conn, wait func() error) {
	t.Helper()
	client, server := net.Pipe()
	return client, ServeConn(t, s, client, server)
}

// ServeConn is Pipe for a pair of connections that exists, wrapped perhaps.
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
