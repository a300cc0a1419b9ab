package sock

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// Unread finds bytes that the peer has sent and that have not been read. It must not be used
// concurrently.
type Unread struct {
	raw   syscall.RawConn
	n     int
	query func(fd uintptr) // sets n; made once, because a function literal allocates
}

// NewUnread returns nil for a connection that is not a socket.
func NewUnread(nc net.Conn) *Unread {
	raw := rawConn(nc)
	if raw == nil {
		return nil
	}
	u := &Unread{raw: raw}
	u.query = func(fd uintptr) {
		n, err := unix.IoctlGetInt(int(fd), unix.TIOCINQ)
		if err != nil {
			n = 0
		}
		u.n = n
	}
	return u
}

// Any reports whether there are such bytes, false if the connection is closed.
func (u *Unread) Any() bool {
	u.n = 0
	_ = u.raw.Control(u.query) // an error means that the connection is closed
	return u.n > 0
}
