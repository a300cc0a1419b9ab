package nbd

import (
	"io"
	"net"
	"time"

	"xapi-nbd/nbd/internal/neterr"
)

// readHandshake fills p with bytes of the handshake. It reads no byte more, because the
// next one may belong to TLS.
func (c *conn) readHandshake(p []byte) error {
	if c.bytesLeft -= int64(len(p)); c.bytesLeft < 0 {
		return hardDisconnect("too many bytes in one handshake", nil)
	}
	if c.hasPeeked && len(p) > 0 {
		p[0], c.hasPeeked = c.peeked, false
		p = p[1:]
	}
	return c.wait(func(deadline time.Time) error {
		c.setReadDeadline(deadline)
		_, err := io.ReadFull(c.nc, p)
		return err
	})
}

// writeHandshake sends all of b. The wait for a peer that does not read counts against the
// handshake timeout too.
func (c *conn) writeHandshake(b []byte) error {
	return c.wait(func(deadline time.Time) error {
		if err := c.setWriteDeadline(deadline); err != nil {
			return err
		}
		_, err := c.nc.Write(b)
		return err
	})
}

// wait calls do, which waits for the peer during the handshake until the deadline, and
// charges the time to the handshake timeout.
func (c *conn) wait(do func(deadline time.Time) error) error {
	begin := time.Now()
	c.waitingSince.Store(begin.UnixNano())
	err := do(begin.Add(c.timeLeft))
	c.waitingSince.Store(0)
	took := time.Since(begin)
	c.waited.Add(int64(took))
	c.timeLeft -= took
	switch {
	case !neterr.IsTimeout(err):
		return err
	case c.isStopped():
		return ErrServerClosed
	}
	return hardDisconnect("handshake timeout: the peer kept the server waiting", err)
}

// waitedFor returns how long the server has waited for the peer during the handshake, 0 if
// it does not wait at present. It may be called concurrently.
func (c *conn) waitedFor(now time.Time) time.Duration {
	since := c.waitingSince.Load()
	if since == 0 {
		return 0
	}
	return time.Duration(c.waited.Load() + now.UnixNano() - since)
}

// setWriteDeadline sets the deadline of writes. Zero means none.
func (c *conn) setWriteDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.killed.Load():
		return net.ErrClosed
	case c.ending:
		return nil
	}
	return c.nc.SetWriteDeadline(t)
}

// endRead interrupts a read that is running. Later reads set a deadline of their own.
func (c *conn) endRead() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.ending {
		c.nc.SetReadDeadline(aLongTimeAgo)
	}
}

// setReadDeadline sets the deadline of reads, at the latest c.latest. Zero means none.
func (c *conn) setReadDeadline(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.latest.IsZero() && (t.IsZero() || t.After(c.latest)) {
		t = c.latest
	}
	if !c.ending {
		c.nc.SetReadDeadline(t)
	}
}

// aLongTimeAgo is a deadline that interrupts reads and writes at once.
var aLongTimeAgo = time.Unix(1, 0)

// wake interrupts the wait for a request, and all later ones.
func (c *conn) wake() { c.readUntil(aLongTimeAgo) }

// readUntil interrupts all reads at t, except for those of payloads.
func (c *conn) readUntil(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.latest = t
	if !c.inPayload && !c.ending {
		c.nc.SetReadDeadline(t)
	}
}

// readPayload calls read, which reads the n bytes of a payload. stop and wake do not
// interrupt it: its request has to be answered.
func (c *conn) readPayload(n int64, read func() error) error {
	c.setInPayload(true, time.Now().Add(c.transferTime(n)))
	err := read()
	c.setInPayload(false, time.Time{})
	return err
}

// setInPayload records whether a payload is being read, and sets the read deadline.
func (c *conn) setInPayload(inPayload bool, deadline time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.inPayload = inPayload
	if c.killed.Load() {
		deadline = aLongTimeAgo
	}
	if !c.ending {
		c.nc.SetReadDeadline(deadline)
	}
}
