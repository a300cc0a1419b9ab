package client

import (
	"errors"
	"fmt"
	"io"
	"syscall"
	"time"

	"xapi-nbd/nbd/internal/neterr"
)

// LostError is the error of a connection that the server closed, or that broke. The
// protocol has no message for the reason; the server's log may tell it.
type LostError struct {
	Outstanding int   // the number of requests without a complete reply
	InsideReply bool  // whether the connection ended inside a reply
	Err         error // the error of the connection; [io.ErrUnexpectedEOF] if the server closed it
}

func (e *LostError) Error() string {
	where := "connection lost"
	if e.InsideReply {
		where += " inside a reply"
	}
	return fmt.Sprintf("%s: %v (%s)", where, connError{e.Err}, outstanding(e.Outstanding))
}

// Unwrap returns Err.
func (e *LostError) Unwrap() error { return e.Err }

// connError describes an error of a connection without the names of system calls.
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

// Unwrap returns the described error.
func (e connError) Unwrap() error { return e.error }

// lost returns the LostError for an error of the connection. Conn.fail fills in the
// number of outstanding requests.
func lost(insideReply bool, err error) error {
	return &LostError{InsideReply: insideReply, Err: unexpected(err)}
}

// sendFailed is called when a request could not be sent. If the server has closed the
// connection, it may have sent the reason before: the receiver then reads what has
// arrived, for at most closeTimeout, before the connection is closed.
func (c *Conn) sendFailed(err error) {
	if !neterr.IsGone(err) {
		c.fail(fmt.Errorf("cannot send a request: %w", err))
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.noMoreRequests = true
	c.sendErr = lost(false, err)
	c.readEnd = time.Now().Add(closeTimeout)
	c.nc.SetReadDeadline(c.readEnd)
}
