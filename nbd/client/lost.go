package client

import (
	"errors"
	"fmt"
	"io"
	"syscall"
	"time"

	"xapi-nbd/nbd/internal/neterr"
)

// LostError says that a connection ended without the client having asked for it:
// the server closed it, or it broke. The protocol has no way to tell the reason;
// the server's log may.
type LostError struct {
	Outstanding int   // requests without a complete reply when it happened
	InsideReply bool  // a reply was cut short
	Err         error // [io.ErrUnexpectedEOF] where the server closed the connection
}

func (e *LostError) Error() string {
	where := "connection lost"
	if e.InsideReply {
		where += " inside a reply"
	}
	return fmt.Sprintf("%s: %v (%s)", where, connError{e.Err}, outstanding(e.Outstanding))
}

// Unwrap returns the error of the connection.
func (e *LostError) Unwrap() error { return e.Err }

// connError is an error of a connection in words.
type connError struct{ error }

func (e connError) Error() string {
	err := e.error
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.ErrClosedPipe):
		return "the server closed the connection"
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return "the connection was reset by the server, or on the way to it"
	case errors.Is(err, syscall.ETIMEDOUT):
		return "the server did not acknowledge what was sent; it is down, or the network to it"
	case neterr.IsTimeout(err):
		return "timeout"
	}
	return err.Error()
}

// Unwrap returns the error itself.
func (e connError) Unwrap() error { return e.error }

// lost makes an error of the connection one that says what was lost by it.
func lost(insideReply bool, err error) error {
	return &LostError{InsideReply: insideReply, Err: unexpected(err)}
}

// sendFailed ends the sending. If the connection is gone, what the server said
// before it left may still be unread, and may be the reason: the receiver reads
// on to the end.
func (c *Conn) sendFailed(err error) {
	if !neterr.IsGone(err) {
		c.fail(fmt.Errorf("cannot send a request: %w", err))
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.quit = true
	c.sendErr = lost(false, err)
	c.readEnd = time.Now().Add(closePatience)
	c.nc.SetReadDeadline(c.readEnd)
}
