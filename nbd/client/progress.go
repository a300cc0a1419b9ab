package client

import (
	"fmt"
	"os"
	"time"

	"xapi-nbd/nbd/wire"
)

const (
	// flushPatience is by how much longer a request that needs stable storage may
	// take: a server may have gigabytes in its cache.
	flushPatience = 10
	// sendPiece is how much is written at once, so that a long request that the
	// server takes slowly shows progress.
	sendPiece = 64 << 10
)

// StallError says that a connection was ended because nothing was sent or received
// on it for [Config.ProgressTimeout], although requests were outstanding. It
// matches [os.ErrDeadlineExceeded].
type StallError struct {
	After       time.Duration // how long there was no progress
	Wait        string        // what the connection was waiting for
	Outstanding int           // requests without a complete reply
}

func (e *StallError) Error() string {
	return fmt.Sprintf("no progress for %v: %s (%s)", e.After, e.Wait, outstanding(e.Outstanding))
}

// Is matches os.ErrDeadlineExceeded.
func (e *StallError) Is(target error) bool { return target == os.ErrDeadlineExceeded }

// Timeout makes it a timeout for those who ask by [net.Error].
func (e *StallError) Timeout() bool { return true }

// outstanding is a number of requests in words.
func outstanding(n int) string {
	if n == 1 {
		return "1 request outstanding"
	}
	return fmt.Sprintf("%d requests outstanding", n)
}

// progress notes that something was sent or received.
func (c *Conn) progress() {
	if c.timeout > 0 {
		c.lastProgress.Store(int64(time.Since(c.began)))
	}
}

// watchProgress starts the timer with the first of the outstanding requests; c.mu
// is held.
func (c *Conn) watchProgress() {
	if c.timeout == 0 {
		return
	}
	if len(c.waiting) == 0 {
		c.progress()
	}
	switch {
	case c.watching:
		return
	case c.stall == nil:
		c.stall = time.AfterFunc(c.timeout, c.checkProgress)
	default:
		c.stall.Reset(c.timeout)
	}
	c.watching = true
}

// checkProgress ends the connection if it makes no progress, or looks again when
// that may be so.
func (c *Conn) checkProgress() {
	c.mu.Lock()
	if len(c.waiting) == 0 || c.ended {
		c.watching = false
		c.mu.Unlock()
		return
	}
	limit := c.patience()
	idle := time.Since(c.began) - time.Duration(c.lastProgress.Load())
	if idle < limit {
		c.stall.Reset(limit - idle)
		c.mu.Unlock()
		return
	}
	err := &StallError{After: limit, Wait: c.waitsFor(), Outstanding: len(c.waiting)}
	c.mu.Unlock()
	c.fail(err)
}

// patience is how long nothing may happen, given what is outstanding; c.mu is
// held.
func (c *Conn) patience() time.Duration {
	for _, call := range c.waiting {
		if call.req.Command == wire.CmdFlush || call.req.Flags&wire.CmdFlagFUA != 0 {
			return flushPatience * c.timeout
		}
	}
	return c.timeout
}

// waitsFor says what the connection waits for: that a request is taken, or the
// reply to the oldest one; c.mu is held.
func (c *Conn) waitsFor() string {
	if c.beingSent != nil {
		return "the server does not read " + describe(*c.beingSent)
	}
	var oldest, begun *call
	for _, call := range c.waiting {
		if oldest == nil || call.req.Cookie < oldest.req.Cookie {
			oldest = call
		}
		if call.begun {
			begun = call
		}
	}
	if begun != nil {
		return "the reply to " + describe(begun.req) + " has begun and does not end"
	}
	return "no reply to " + describe(oldest.req)
}

// describe is a request for messages.
func describe(r wire.Request) string {
	if r.Command == wire.CmdFlush {
		return r.Command.String()
	}
	return fmt.Sprintf("%v of %d bytes at %d", r.Command, r.Length, r.Offset)
}

// progressReader reads from the connection and notes that something came.
type progressReader struct{ c *Conn }

// Read implements io.Reader.
func (r progressReader) Read(p []byte) (int, error) {
	n, err := r.c.nc.Read(p)
	if n > 0 {
		r.c.progress()
	}
	return n, err
}
