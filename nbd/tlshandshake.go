package nbd

import (
	"context"
	"crypto/tls"
	"net"
	"runtime"
	"sync/atomic"
	"time"
)

// tlsTurns limits the TLS handshakes that compute at the same time, to half of the
// processors: a hundred connections at once then finish one after the other, well
// within the handshake timeout, and disks that are being read keep the other half.
type tlsTurns chan struct{}

func newTLSTurns() tlsTurns { return make(tlsTurns, max(runtime.GOMAXPROCS(0)/2, 1)) }

func (t tlsTurns) take() { t <- struct{}{} }
func (t tlsTurns) give() { <-t }

// tlsHandshake is the connection below TLS. During the TLS handshake it gives the turn
// away while it waits for the peer, and charges only these waits to the handshake
// timeout: neither slow peers nor slow processors count for others.
type tlsHandshake struct {
	net.Conn
	c     *conn
	turns tlsTurns
	over  atomic.Bool // the handshake has ended
}

// run does the handshake of t, which reads from and writes to h.
func (h *tlsHandshake) run(ctx context.Context, t *tls.Conn) error {
	h.turns.take()
	defer h.turns.give()
	return t.HandshakeContext(ctx)
}

// Read implements net.Conn.
func (h *tlsHandshake) Read(p []byte) (n int, err error) {
	if h.over.Load() {
		return h.Conn.Read(p)
	}
	err = h.wait(func(deadline time.Time) error {
		h.c.setReadDeadline(deadline)
		n, err = h.Conn.Read(p)
		return err
	})
	return n, err
}

// Write implements net.Conn.
func (h *tlsHandshake) Write(p []byte) (n int, err error) {
	if h.over.Load() {
		return h.Conn.Write(p)
	}
	err = h.wait(func(deadline time.Time) error {
		if err := h.c.setWriteDeadline(deadline); err != nil {
			return err
		}
		n, err = h.Conn.Write(p)
		return err
	})
	return n, err
}

func (h *tlsHandshake) wait(do func(deadline time.Time) error) error {
	h.turns.give()
	defer h.turns.take()
	return h.c.wait(do)
}
