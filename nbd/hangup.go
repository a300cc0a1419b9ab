package nbd

import (
	"crypto/tls"
	"io"
	"net"
	"time"
)

// A connection ends with a FIN behind the last reply, never with a RST: closing a
// socket while there are unread bytes sends a RST, and the peer's system then throws
// away replies that the peer has not read yet. So the server reads on after its FIN,
// within these limits.
const (
	// hangUpQuiet is how long the peer may be silent. By then everything that it had
	// sent before it got the FIN has arrived.
	hangUpQuiet = time.Second
	// hangUpTime and hangUpBytes bound it for peers that go on sending.
	hangUpTime  = 5 * time.Second
	hangUpBytes = 64 << 20
	// maxHangingUp is how many connections may be in that state once they have been
	// served; above it one is closed at once.
	maxHangingUp = 256
)

// halfCloser is a connection that can end its own direction alone, as sockets can.
type halfCloser interface {
	net.Conn
	CloseWrite() error
}

// hangUp ends the connection in the background, whatever is read or written. Only
// the first call does something. c.hungUp is closed when the peer has been told,
// c.closed when the connection is closed.
func (c *conn) hangUp() {
	if !c.hangsUp.CompareAndSwap(false, true) {
		return
	}
	c.mu.Lock()
	c.ending = true // deadlines are those of the hanging up from now on
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

// tellEnd ends what is sent: with the alert close_notify of TLS, then with a FIN.
func (c *conn) tellEnd(nc net.Conn, half halfCloser) {
	defer close(c.hungUp)
	// An alert behind half a record would look like an attack to the peer.
	if t, ok := nc.(*tls.Conn); ok && !c.batch.Failed() {
		_ = t.CloseWrite() // fails if the handshake has not ended: then there is none to send
	}
	_ = half.CloseWrite() // fails if the peer has gone, which drain notices
}

// drain reads what the peer sends until it closes its end, within the limits.
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

// requestReader is what the transmission phase reads from. After the connection was
// killed nothing that arrives is a request any more: drain has read some of it.
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
