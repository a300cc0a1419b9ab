package nbd

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"time"

	"xapi-nbd/nbd/wire"
)

// This file has the rule for the end of a connection, whoever decides it: the client, or
// the server because it stops, because an administrator disconnects the client, because the
// client's session was logged out, because the device is lost, because a limit is reached,
// or because the peer broke the protocol.
//
//  1. Requests that have begun are answered. The caller limits how long that may take.
//  2. If the server decided the end, a client with simple replies gets NBD_ESHUTDOWN for each
//     request that it still sends, until its NBD_CMD_DISC, for farewellTime at most. Xen
//     Orchestra's client up to version 3.5.0 ends its process when a connection ends that it
//     has not ended itself, but after an error it sends NBD_CMD_DISC and connects again.
//  3. Clients with structured replies get no such error. For libnbd the error and the end are
//     the same, but qemu with reconnect-delay connects again after an end, and passes an
//     error to its guest.
//  4. The end itself is the alert close_notify of TLS, then a FIN after the last reply.
//  5. Never a RST: closing a socket that has unread bytes sends one, after which the peer's
//     system drops the replies that the peer has not read yet. Xen Orchestra's client 3.6.0
//     then waits for ever. So the server reads on after its FIN, within limits. A unix socket
//     reports ECONNRESET in the same case, and is treated in the same way.
//
// Step 2 is left out if the server cannot tell where the next request begins, or cannot
// send a reply any more: after a breach of the protocol, after an error in the middle of a
// simple reply, when the peer does not read, and when requests in flight did not end in time.
//
// The rule needs a living process. When the process crashes or is killed, the kernel closes
// its sockets, with a RST for those that have unread bytes.
const (
	// farewellTime limits step 2, from the last reply to a request that had begun.
	farewellTime = 2 * time.Second
	// hangUpQuiet is how long the server waits for further bytes after its FIN. By then all
	// bytes have arrived that the peer sent before it received the FIN.
	hangUpQuiet = time.Second
	// hangUpTime and hangUpBytes limit peers that continue to send.
	hangUpTime  = 5 * time.Second
	hangUpBytes = 64 << 20
	// alertTime is how long sending the alert of TLS may take, if the peer does not read.
	alertTime = time.Second
	// spareHangingUp is how many more connections than MaxConns may be in this state. If
	// there are more, a connection is closed as soon as the FIN has been sent.
	spareHangingUp = 256
)

// halfCloser is a connection, such as a socket, that can close its sending direction alone.
type halfCloser interface {
	net.Conn
	CloseWrite() error
}

// ending is how the reading of requests ended.
type ending struct {
	err error // nil after NBD_CMD_DISC
	// byServer is true if the server decided the end while it waited for a request, so that
	// the next bytes of the peer are a request.
	byServer bool
}

// serverEnd is an error with which the server ends the reading of requests between two of
// them.
type serverEnd struct{ error }

// endingOf returns the ending for the error of transmission.next.
func endingOf(err error) ending {
	var decided serverEnd
	switch {
	case errors.Is(err, errDisconnected):
		return ending{}
	case errors.As(err, &decided):
		return ending{decided.error, true}
	}
	return ending{err: err}
}

// farewell returns the function for step 2 of the rule, nil if the step is left out.
func (t *transmission) farewell(e ending) func() {
	if !e.byServer || t.sess.mode != simpleReplies {
		return nil
	}
	return t.refuseAll
}

// refuseAll refuses all further requests, until NBD_CMD_DISC or until the connection fails
// or times out. It does not use the device.
func (t *transmission) refuseAll() {
	for {
		b, err := t.in.Peek(t.requestLen())
		if err != nil {
			return
		}
		req, err := t.parseRequest(b)
		if err != nil || disconnects(req) {
			return
		}
		t.in.Discard(len(b))
		if _, err := io.CopyN(io.Discard, t.in, int64(t.sess.payloadLength(req))); err != nil {
			return
		}
		t.out.sendResult(req, wire.ESHUTDOWN)
	}
}

// hangUp starts to close the connection, in a goroutine of its own, even while other
// goroutines read and write. Only the first call has an effect. If farewell is not nil, no
// other goroutine may read or write, and farewell is called first. c.hungUp is closed when
// the FIN has been sent, c.closed when the connection is closed.
func (c *conn) hangUp(farewell func()) {
	if !c.hangsUp.CompareAndSwap(false, true) {
		return
	}
	c.mu.Lock()
	c.ending = true // from now on only hangUp sets deadlines
	nc, raw := c.nc, c.raw
	c.mu.Unlock()
	half, ok := raw.(halfCloser)
	if !ok && farewell == nil {
		c.closeWhole(nc)
		return
	}
	go func() {
		if farewell != nil {
			c.callFarewell(farewell)
		}
		if !ok {
			c.closeWhole(nc)
			return
		}
		defer close(c.closed)
		defer half.Close()
		c.tellEnd(nc, half)
		drain(half)
	}()
}

// closeWhole closes a connection whose directions cannot be closed one by one.
func (c *conn) closeWhole(nc net.Conn) {
	defer c.limitAlert()()
	nc.Close()
	close(c.hungUp)
	close(c.closed)
}

// callFarewell calls farewell with the deadline of step 2. kill interrupts it.
func (c *conn) callFarewell(farewell func()) {
	if c.setFarewell(true) {
		farewell()
		c.setFarewell(false)
	}
}

// setFarewell records whether a farewell is running, and sets its deadline. It returns
// false if the connection was killed.
func (c *conn) setFarewell(running bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.inFarewell = running
	if c.killed.Load() {
		return false
	}
	if running {
		c.nc.SetDeadline(time.Now().Add(farewellTime))
	}
	return true
}

// limitAlert interrupts writes after alertTime, unless the function that it returns has been
// called by then.
func (c *conn) limitAlert() (stop func()) {
	timer := time.AfterFunc(alertTime, func() { _ = c.raw.SetWriteDeadline(aLongTimeAgo) }) // an error: it is closed
	return func() { timer.Stop() }
}

// tellEnd closes the sending direction: with the alert close_notify of TLS, then with a FIN.
func (c *conn) tellEnd(nc net.Conn, half halfCloser) {
	defer close(c.hungUp)
	defer c.limitAlert()()
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
