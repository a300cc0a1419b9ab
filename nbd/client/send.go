package client

import (
	"bytes"
	"context"
	"net"
	"time"

	"xapi-nbd/nbd/internal/neterr"
	"xapi-nbd/nbd/wire"
)

// joinLimit is up to which length a payload is copied behind its header, to
// leave in one piece: one segment, or one TLS record.
const joinLimit = 16 << 10

// closePatience is how long an end of the connection tries to tell the server.
const closePatience = 5 * time.Second

// send writes a request. If the connection fails so does everything on it; sent
// is false if nothing left because ctx ended first.
func (c *Conn) send(ctx context.Context, r wire.Request, payload []byte) (sent bool, err error) {
	select {
	case c.sending <- struct{}{}:
	case <-ctx.Done():
		return false, context.Cause(ctx)
	case <-c.done:
		return true, nil // the call has its error
	}
	if !c.beginSend(r) {
		<-c.sending
		return true, nil // likewise, soon
	}
	header := c.header(r)
	n, interrupted, err := c.write(ctx, header, payload)
	switch {
	case err == nil:
		c.endSend()
		return true, nil
	case interrupted && neterr.IsTimeout(err) && c.resumable():
		// Half a request cannot be taken back: the rest goes from a copy.
		rest := bytes.Clone(header[min(n, len(header)):])
		rest = append(rest, payload[max(n-len(header), 0):]...)
		go func() { // ends with the write, which Close ends and waits for
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

// beginSend notes what the sender, who has the token, sends, and reports whether
// it may be sent.
func (c *Conn) beginSend(r wire.Request) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.quit && r.Command != wire.CmdDisc {
		return false
	}
	c.beingSent = &r
	return true
}

// endSend gives the token back.
func (c *Conn) endSend() {
	c.mu.Lock()
	c.beingSent = nil
	c.mu.Unlock()
	<-c.sending
}

// header makes the header of a request; the sender has the token.
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

// write sends a request unless ctx ends; interrupted says that it did.
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

// writeAll writes both, the first with the beginning of the second. The sender has
// the token.
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

// resumable reports whether a write that timed out can go on where it stopped,
// which crypto/tls excludes.
func (c *Conn) resumable() bool {
	_, encrypted := c.nc.(interface{ NetConn() net.Conn })
	return !encrypted
}

// disconnect sends NBD_CMD_DISC once, but does not wait long for a server that
// reads nothing, nor for a request in front that waits for it.
func (c *Conn) disconnect() {
	c.mu.Lock()
	first := !c.quit
	c.quit = true
	if first {
		c.writeEnd = time.Now().Add(closePatience)
		c.nc.SetWriteDeadline(c.writeEnd)
	}
	c.mu.Unlock()
	if first {
		c.send(context.Background(), wire.Request{Command: wire.CmdDisc}, nil)
	}
}

// Close sends NBD_CMD_DISC, so that the server ends in peace, and closes the
// connection. Calls that wait for an answer fail. No goroutine is left when it
// returns.
func (c *Conn) Close() error {
	c.mu.Lock()
	alive := c.err == nil || c.leaving
	if c.err == nil {
		c.err = errClosed
	}
	c.mu.Unlock()
	if alive {
		c.disconnect()
	}
	err := c.nc.Close()
	<-c.done
	c.sending <- struct{}{} // nobody sends the rest of a request
	<-c.sending
	if !alive || neterr.IsGone(err) { // the server may close first
		return nil
	}
	return err
}
