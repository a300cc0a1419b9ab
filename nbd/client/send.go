package client

import (
	"bytes"
	"context"
	"net"
	"time"

	"xapi-nbd/nbd/internal/neterr"
	"xapi-nbd/nbd/wire"
)

// joinLimit is the length in bytes up to which a payload is copied behind its header, so
// that both are sent in one segment or one TLS record.
const joinLimit = 16 << 10

// closeTimeout is how long the client tries to tell the server that it ends the connection.
const closeTimeout = 5 * time.Second

// send sends a request. sent is false if nothing was sent because ctx was done first. If the
// connection fails, send ends it and returns no error: the receiver then ends all calls.
func (c *Conn) send(ctx context.Context, r wire.Request, payload []byte) (sent bool, err error) {
	select {
	case c.sending <- struct{}{}:
	case <-ctx.Done():
		return false, context.Cause(ctx)
	case <-c.done:
		return true, nil // the receiver has ended the call
	}
	if !c.beginSend(r) {
		<-c.sending
		return true, nil // the receiver ends the call soon
	}
	header := c.header(r)
	n, interrupted, err := c.write(ctx, header, payload)
	switch {
	case err == nil:
		c.endSend()
		return true, nil
	case interrupted && neterr.IsTimeout(err) && c.resumable():
		// The server needs the rest of the request to find the next one. The caller
		// gets its buffer back now, so the rest is sent from a copy.
		rest := bytes.Clone(header[min(n, len(header)):])
		rest = append(rest, payload[max(n-len(header), 0):]...)
		go func() { // returns after the write; Close ends it and waits
			defer c.endSend()
			if _, err := c.writeAll(nil, rest); err != nil {
				c.sendFailed(err)
			}
		}()
		return true, nil
	}
	c.endSend()
	c.sendFailed(err)
	return true, nil
}

// beginSend records the request that is being sent, and reports whether it may be sent. The
// caller holds the send token.
func (c *Conn) beginSend(r wire.Request) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.noMoreRequests && r.Command != wire.CmdDisc {
		return false
	}
	c.beingSent = &r
	return true
}

// endSend returns the send token.
func (c *Conn) endSend() {
	c.mu.Lock()
	c.beingSent = nil
	c.mu.Unlock()
	<-c.sending
}

// header encodes the header of a request. The caller holds the send token.
func (c *Conn) header(r wire.Request) []byte {
	if c.mode == extendedHeaders {
		if r.Command == wire.CmdWrite {
			// Section "Command flags": with extended headers the flag says
			// that a payload follows.
			r.Flags |= wire.CmdFlagPayloadLen
		}
		return r.AppendExtended(c.scratch[:0])
	}
	return r.Append(c.scratch[:0])
}

// write writes a request. If ctx is done first, it stops; interrupted reports that.
func (c *Conn) write(ctx context.Context, header, payload []byte) (n int, interrupted bool, err error) {
	if ctx.Done() == nil {
		n, err := c.writeAll(header, payload)
		return n, false, err
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		c.mu.Lock()
		defer c.mu.Unlock()
		c.nc.SetWriteDeadline(aLongTimeAgo)
	})
	n, err = c.writeAll(header, payload)
	if interrupted = !stop(); interrupted {
		<-ended
		c.mu.Lock()
		defer c.mu.Unlock()
		c.nc.SetWriteDeadline(c.writeEnd)
	}
	return n, interrupted, err
}

// writeAll writes header and payload, the header together with the first bytes of the
// payload. The caller holds the send token.
func (c *Conn) writeAll(header, payload []byte) (n int, err error) {
	if len(payload) <= joinLimit {
		header, payload = append(header, payload...), nil
		c.scratch = header
	}
	for {
		piece := payload[:min(len(payload), sendPiece)]
		payload = payload[len(piece):]
		out := net.Buffers{header}
		switch {
		case header == nil:
			out[0] = piece
		case len(piece) > 0:
			out = append(out, piece)
		}
		written, err := out.WriteTo(c.nc)
		n += int(written)
		if err != nil {
			return n, err
		}
		c.progress()
		if len(payload) == 0 {
			return n, nil
		}
		header = nil
	}
}

// resumable reports whether a write that timed out can be continued where it stopped.
// crypto/tls does not allow that.
func (c *Conn) resumable() bool {
	_, encrypted := c.nc.(interface{ NetConn() net.Conn })
	return !encrypted
}

// disconnect sends NBD_CMD_DISC once. It gives up after closeTimeout if the server does not
// read, or if a request in front of it cannot be sent.
func (c *Conn) disconnect() {
	c.mu.Lock()
	first := !c.noMoreRequests
	c.noMoreRequests = true
	if first {
		c.writeEnd = time.Now().Add(closeTimeout)
		c.nc.SetWriteDeadline(c.writeEnd)
	}
	c.mu.Unlock()
	if first {
		c.send(context.Background(), wire.Request{Command: wire.CmdDisc}, nil)
	}
}

// Close sends NBD_CMD_DISC, which tells the server that the client ends the connection on
// purpose, and closes the connection. It does not flush: call [Conn.Flush] first if writes
// must survive a crash of the server. Calls that wait for a reply fail with an error that
// matches [net.ErrClosed]. Close waits for at most 5 seconds for a server that does not
// read. When it returns, no goroutine of the Conn is left. Close may be called more than
// once, and returns nil if the connection has ended already.
func (c *Conn) Close() error {
	c.mu.Lock()
	alive := c.err == nil || c.serverLeaves
	if c.err == nil {
		c.err = errClosed
	}
	c.mu.Unlock()
	if alive {
		c.disconnect()
	}
	err := c.nc.Close()
	<-c.done
	c.sending <- struct{}{} // wait for a goroutine that sends the rest of a request
	<-c.sending
	if !alive || neterr.IsGone(err) { // the server may close first
		return nil
	}
	return err
}
