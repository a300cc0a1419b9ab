package nbd

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"
)

// listen listens on a socket of the real network: "tcp", on loopback, or "unix".
func listen(t testing.TB, network string) net.Listener {
	t.Helper()
	addr := "127.0.0.1:0"
	if network == "unix" {
		dir, err := os.MkdirTemp("", "nbd") // shorter than t.TempDir: the name has to fit
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		addr = filepath.Join(dir, "s")
	}
	l, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// serveOn has s serve l until the end of the test.
func serveOn(t testing.TB, s *Server, l net.Listener) {
	t.Helper()
	served := make(chan error, 1)
	go func() { served <- s.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		if err := s.Shutdown(context.Background()); err != nil {
			t.Error(err)
		}
		if err := <-served; !errors.Is(err, ErrServerClosed) {
			t.Errorf("Serve returned %v, want %v", err, ErrServerClosed)
		}
	})
}

// dialGo returns a connection that reads the only export.
func dialGo(t testing.TB, l net.Listener) *Conn {
	t.Helper()
	c, err := Dial(context.Background(), l.Addr().Network(), l.Addr().String(), nil)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := c.Go(context.Background(), "a")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}
