package nbd

import (
	"context"
	"crypto/tls"
	"net"
	"runtime"
	"sync/atomic"
	"time"
)

// tlsSlots limits the TLS handshakes that compute at the same time to half of the
// processors. A hundred handshakes at once then end one after the other, well within the
// handshake timeout, and connections that transfer data keep the other half.
type tlsSlots chan struct{}

func newTLSSlots() tlsSlots { return make(tlsSlots, max(runtime.GOMAXPROCS(0)/2, 1)) }

func (s tlsSlots) take()     { s <- struct{}{} }
func (s tlsSlots) giveBack() { <-s }

// tlsHandshake is the connection below TLS. During the TLS handshake it gives its slot back
// while it waits for the peer, and charges only these waits to the handshake timeout, so
// neither slow peers nor a slow processor count against other connections.
type tlsHandshake struct {
	net.Conn
	c     *conn
	slots tlsSlots
	over  atomic.Bool // the handshake has ended
}

// run does the handshake of t, which reads from and writes to h.
func (h *tlsHandshake) run(ctx context.Context, t *tls.Conn) error {
	h.slots.take()
	defer h.slots.giveBack()
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

// wait calls do, which waits for the peer, without a slot.
func (h *tlsHandshake) wait(do func(deadline time.Time) error) error {
	h.slots.giveBack()
	defer h.slots.take()
	return h.c.wait(do)
}
