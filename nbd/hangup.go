package nbd

import (
	"crypto/tls"
	"io"
	"net"
	"time"
)

// A connection ends with a FIN after the last reply, never with a RST: closing a socket
// that has unread bytes sends a RST, after which the peer's system drops the replies that
// the peer has not read yet. So the server continues to read after its FIN, within these
// limits.
const (
	// hangUpQuiet is how long the server waits for further bytes. By then all bytes have
	// arrived that the peer sent before it received the FIN.
	hangUpQuiet = time.Second
	// hangUpTime and hangUpBytes limit peers that continue to send.
	hangUpTime  = 5 * time.Second
	hangUpBytes = 64 << 20
	// maxHangingUp limits the connections in this state. Above it a connection is closed
	// as soon as the FIN has been sent.
	maxHangingUp = 256
)

// halfCloser is a connection, such as a socket, that can close its sending direction alone.
type halfCloser interface {
	net.Conn
	CloseWrite() error
}

// hangUp starts to close the connection, in a goroutine of its own, even while other
// goroutines read and write. Only the first call has an effect. c.hungUp is closed when
// the FIN has been sent, c.closed when the connection is closed.
func (c *conn) hangUp() {
	if !c.hangsUp.CompareAndSwap(false, true) {
		return
	}
	c.mu.Lock()
	c.ending = true // from now on only hangUp sets deadlines
	nc, raw := c.nc, c.raw
	c.mu.Unlock()
	half, ok := raw.(halfCloser)
	if !ok {
		nc.Close()
		close(c.hungUp)
		close(c.closed)
		return
	}
	go func() {
		defer close(c.closed)
		defer half.Close()
		c.tellEnd(nc, half)
		drain(half)
	}()
}

// tellEnd closes the sending direction: with the alert close_notify of TLS, then with a FIN.
func (c *conn) tellEnd(nc net.Conn, half halfCloser) {
	defer close(c.hungUp)
	// To the peer, an alert after a part of a record would look like an attack.
	if t, ok := nc.(*tls.Conn); ok && !c.batch.Failed() {
		_ = t.CloseWrite() // an error means that the TLS handshake has not ended: no alert is needed
	}
	_ = half.CloseWrite() // an error means that the peer has closed the connection, which drain notices
}

// drain reads and drops the bytes of the peer until it closes its end, within the limits.
func drain(half halfCloser) {
	end := time.Now().Add(hangUpTime)
	b := make([]byte, 32<<10)
	for n := 0; n < hangUpBytes; {
		until := time.Now().Add(hangUpQuiet)
		if until.After(end) {
			until = end
		}
		if half.SetReadDeadline(until) != nil {
			return
		}
		m, err := half.Read(b)
		if n += m; err != nil {
			return
		}
	}
}

// requestReader is the reader of the transmission phase. After kill it returns no more
// bytes: drain may have read some, so the next byte need not be the begin of a request.
type requestReader struct {
	c *conn
	r io.Reader
}

func (r requestReader) Read(p []byte) (int, error) {
	if r.c.killed.Load() {
		return 0, net.ErrClosed
	}
	n, err := r.r.Read(p)
	if r.c.killed.Load() {
		return 0, net.ErrClosed
	}
	return n, err
}
