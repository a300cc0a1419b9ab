package neterr

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
)

// IsTimeout reports whether a deadline ended a read or a write.
func IsTimeout(err error) bool {
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded)
}

// IsGone reports whether the peer closed the connection or the connection broke,
// as opposed to a peer that violated the protocol.
func IsGone(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.ErrClosedPipe) ||
		errors.Is(err, net.ErrClosed) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) ||
		errors.Is(err, syscall.ETIMEDOUT)
}
