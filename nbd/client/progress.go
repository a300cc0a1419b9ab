package client

import (
	"fmt"
	"os"
	"time"

	"xapi-nbd/nbd/wire"
)

const (
	// slowFactor is by how much the progress timeout is longer while a request is
	// outstanding for which a server may have gigabytes to write, or to read, although
	// nothing is sent meanwhile.
	slowFactor = 10
	// sendPiece is how many bytes of a payload are written at once, so that progress
	// is noticed while a server reads a long request slowly.
	sendPiece = 256 << 10
)

// StallError is the error of a connection that was ended because nothing was sent or
// received for [Config.ProgressTimeout] while requests were outstanding. It matches
// [os.ErrDeadlineExceeded].
type StallError struct {
	After       time.Duration // how long nothing was sent or received
	Wait        string        // a description of the missing event, for people
	Outstanding int           // the number of requests without a complete reply
}

func (e *StallError) Error() string {
	return fmt.Sprintf("no progress for %v: %s (%s)", e.After, e.Wait, outstanding(e.Outstanding))
}

// Is reports whether target is [os.ErrDeadlineExceeded].
func (e *StallError) Is(target error) bool { return target == os.ErrDeadlineExceeded }

// Timeout reports true, as package net's errors of a timeout do.
func (e *StallError) Timeout() bool { return true }

// outstanding describes a number of requests.
func outstanding(n int) string {
	if n == 1 {
		return "1 request outstanding"
	}
	return fmt.Sprintf("%d requests outstanding", n)
}

// progress records that something was sent or received.
func (c *Conn) progress() {
	if c.timeout > 0 {
		c.lastProgress.Store(int64(time.Since(c.began)))
	}
}

// watchProgress starts the timer when the first request becomes outstanding. The caller
// holds c.mu.
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

// checkProgress ends the connection if the progress timeout has passed. Otherwise it sets
// the timer to when that can be so at the earliest.
func (c *Conn) checkProgress() {
	c.mu.Lock()
	if len(c.waiting) == 0 || c.ended {
		c.watching = false
		c.mu.Unlock()
		return
	}
	limit := c.progressLimit()
	idle := time.Since(c.began) - time.Duration(c.lastProgress.Load())
	if idle < limit {
		c.stall.Reset(limit - idle)
		c.mu.Unlock()
		return
	}
	err := &StallError{After: limit, Wait: c.waitReason(), Outstanding: len(c.waiting)}
	c.mu.Unlock()
	c.fail(err)
}

// progressLimit returns how long nothing may be sent or received, given the outstanding
// requests. The caller holds c.mu.
func (c *Conn) progressLimit() time.Duration {
	for _, call := range c.waiting {
		if isSlow(call.req) {
			return slowFactor * c.timeout
		}
	}
	return c.timeout
}

// isSlow reports whether a request needs stable storage, or can change a long range without
// any payload.
func isSlow(r wire.Request) bool {
	return r.Command == wire.CmdFlush || r.Command == wire.CmdWriteZeroes || r.Command == wire.CmdTrim ||
		r.Flags&wire.CmdFlagFUA != 0
}

// waitReason describes the event that the connection waits for: the server reads a request,
// or the reply to the oldest one. The caller holds c.mu.
func (c *Conn) waitReason() string {
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

// describe describes a request for error messages.
func describe(r wire.Request) string {
	if r.Command == wire.CmdFlush {
		return r.Command.String()
	}
	return fmt.Sprintf("%v of %d bytes at %d", r.Command, r.Length, r.Offset)
}
