//go:build linux

package nbd

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"syscall"
	"testing"
	"time"

	"xapi-nbd/nbd/internal/neterr"
	"xapi-nbd/nbd/internal/zerocopy"
)

// socketConn returns the server's end of a real connection, which transferTime
// allows one second and more, and the peer's.
func socketConn(t *testing.T, network string) (*conn, net.Conn) {
	t.Helper()
	l := listen(t, network)
	defer l.Close()
	peer, err := net.Dial(network, l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	nc, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{Logger: slog.New(slog.DiscardHandler), Limits: Limits{WriteTimeout: time.Second}}
	s.init()
	c := newConn(s, nc, "1")
	t.Cleanup(func() { c.close(); peer.Close() })
	return c, peer
}

// forSockets runs a test for both kinds of sockets.
func forSockets(t *testing.T, test func(t *testing.T, c *conn, peer net.Conn)) {
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			c, peer := socketConn(t, network)
			test(t, c, peer)
		})
	}
}

// wake interrupts a read that is running, and later ones even if bytes have arrived: stop
// depends on it.
func TestWakeEndsReads(t *testing.T) {
	forSockets(t, func(t *testing.T, c *conn, peer net.Conn) {
		ended := make(chan error)
		go func() {
			_, err := c.nc.Read(make([]byte, 1))
			ended <- err
		}()
		c.wake()
		if err := <-ended; !neterr.IsTimeout(err) {
			t.Errorf("got %v, want a timeout", err)
		}
		if _, err := peer.Write([]byte{1}); err != nil {
			t.Fatal(err)
		}
		c.setReadDeadline(time.Now().Add(time.Hour)) // is not allowed any more
		if n, err := c.nc.Read(make([]byte, 1)); !neterr.IsTimeout(err) {
			t.Errorf("after wake: got %d, %v, want a timeout", n, err)
		}
	})
}

// sendSpliced sends more data than the kernel buffers, through a pipe.
func sendSpliced(t *testing.T, c *conn) error {
	t.Helper()
	can := capabilitiesOf(newSpliceDevice(t, patternOf(0, 32<<20)))
	s := newSender(c, can)
	if s == nil {
		t.Fatal("no sender")
	}
	var data zerocopy.Pipes
	if err := can.file.Fill(&data, 0, 32<<20); err != nil {
		t.Fatal(err)
	}
	defer data.Release()
	return c.writeSpliced(s, make([]byte, 16), &data)
}

// A peer that takes nothing is not waited for longer than the write timeout,
// however the reply is sent.
func TestSplicedReplyTimesOut(t *testing.T) {
	forSockets(t, func(t *testing.T, c *conn, _ net.Conn) {
		var reason *HardDisconnectError
		c.srv.SetLimits(Limits{WriteTimeout: -time.Hour}) // has passed already
		if err := sendSpliced(t, c); !errors.As(err, &reason) || !neterr.IsTimeout(err) {
			t.Errorf("got %v, want a timeout", err)
		}
	})
}

// kill interrupts reads and splices.
func TestKillEndsASplice(t *testing.T) {
	forSockets(t, func(t *testing.T, c *conn, peer net.Conn) {
		ended := make(chan error)
		go func() {
			_, err := c.nc.Read(make([]byte, 1))
			ended <- err
		}()
		go func() { ended <- sendSpliced(t, c) }()
		if _, err := io.ReadFull(peer, make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
		c.kill(errors.New("test"))
		for range 2 {
			// Woken by its deadline, by the FIN, or by the end of the socket.
			if err := <-ended; !errors.Is(err, net.ErrClosed) && !errors.Is(err, syscall.EPIPE) && !neterr.IsTimeout(err) {
				t.Errorf("got %v, want the end", err)
			}
		}
		// The peer sees the end.
		if n, err := io.Copy(io.Discard, peer); n >= 32<<20 {
			t.Errorf("the peer got all %d bytes (%v)", n, err)
		}
	})
}

// A connection that comes too late is closed.
func TestLateConnectionIsClosed(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	peer, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	nc, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{Exporter: cheapExporter{}}
	if err := s.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.ServeConn(t.Context(), nc); !errors.Is(err, ErrServerClosed) {
		t.Errorf("got %v, want ErrServerClosed", err)
	}
	peer.SetReadDeadline(time.Now().Add(30 * time.Second))
	if _, err := peer.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the peer got %v, want EOF", err)
	}
}
