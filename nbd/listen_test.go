package nbd

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"

	"xapi-nbd/nbd/client"
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
func dialGo(t testing.TB, l net.Listener) *client.Conn {
	t.Helper()
	c, err := client.Dial(context.Background(), l.Addr().Network(), l.Addr().String(), nil)
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

// rawDial connects to a server by EXPORT_NAME.
func rawDial(t testing.TB, l net.Listener) net.Conn {
	t.Helper()
	nc, err := net.Dial(l.Addr().Network(), l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	var greeting [18]byte
	if _, err := io.ReadFull(nc, greeting[:]); err != nil {
		t.Fatal(err)
	}
	hello := appendUint64([]byte{0, 0, 0, 3}, 0x49484156454F5054) // flags, IHAVEOPT
	hello = append(hello, 0, 0, 0, 1, 0, 0, 0, 1, 'a')            // EXPORT_NAME "a"
	if _, err := nc.Write(hello); err != nil {
		t.Fatal(err)
	}
	var answer [10]byte
	if _, err := io.ReadFull(nc, answer[:]); err != nil {
		t.Fatal(err)
	}
	return nc
}

// connTo negotiates simple replies with a server.
func connTo(t testing.TB, nc net.Conn, name string) *client.Conn {
	t.Helper()
	return connWith(t, nc, name, &client.Config{NoStructured: true})
}

// connWith returns a connection of package client to a server, for an export.
func connWith(t testing.TB, nc net.Conn, name string, cfg *client.Config) *client.Conn {
	t.Helper()
	c, err := client.New(t.Context(), nc, cfg)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := c.Go(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}
