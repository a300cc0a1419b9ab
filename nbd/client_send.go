package nbd

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"time"

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
	if r.Command != wire.CmdDisc && c.quitting() {
		<-c.sending
		return true, nil // likewise, soon
	}
	header := c.header(r)
	out := net.Buffers{header, payload}
	if len(payload) <= joinLimit {
		c.scratch = append(header, payload...)
		out = net.Buffers{c.scratch}
	}
	n, interrupted, err := c.write(ctx, out)
	switch {
	case err == nil:
		<-c.sending
		return true, nil
	case interrupted && isTimeout(err) && c.resumable():
		// Half a request cannot be taken back: the rest goes from a copy.
		rest := bytes.Clone(header[min(n, len(header)):])
		rest = append(rest, payload[max(n-len(header), 0):]...)
		go func() { // ends with the write, which Close ends and waits for
			defer func() { <-c.sending }()
			if _, err := c.nc.Write(rest); err != nil {
				c.fail(fmt.Errorf("cannot send a request: %w", err))
			}
		}()
		return true, nil
	}
	<-c.sending
	c.fail(fmt.Errorf("cannot send a request: %w", err))
	return true, nil
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

// write sends all of out unless ctx ends; interrupted says that it did.
func (c *Conn) write(ctx context.Context, out net.Buffers) (n int, interrupted bool, err error) {
	if ctx.Done() == nil {
		n, err := out.WriteTo(c.nc)
		return int(n), false, err
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		c.mu.Lock()
		defer c.mu.Unlock()
		c.nc.SetWriteDeadline(aLongTimeAgo)
	})
	written, err := out.WriteTo(c.nc)
	if interrupted = !stop(); interrupted {
		<-ended
		c.mu.Lock()
		defer c.mu.Unlock()
		c.nc.SetWriteDeadline(c.writeEnd)
	}
	return int(written), interrupted, err
}

// resumable reports whether a write that timed out can go on where it stopped,
// which crypto/tls excludes.
func (c *Conn) resumable() bool {
	_, encrypted := c.nc.(interface{ NetConn() net.Conn })
	return !encrypted
}

// quitting reports whether nothing may be sent any more.
func (c *Conn) quitting() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.quit
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
	if !alive || isGone(err) { // the server may close first
		return nil
	}
	return err
}
