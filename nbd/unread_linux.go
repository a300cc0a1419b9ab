package nbd

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// unreadProbe tells whether the peer of a connection has sent bytes that have not
// been read. It must not be used concurrently.
type unreadProbe struct {
	socket syscall.RawConn
	n      int
	step   func(fd uintptr) // made once, because each call would allocate it
}

// newUnreadProbe returns nil for a connection that is not a socket.
func newUnreadProbe(nc net.Conn) *unreadProbe {
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return nil
	}
	socket, err := sc.SyscallConn()
	if err != nil {
		return nil
	}
	p := &unreadProbe{socket: socket}
	p.step = func(fd uintptr) {
		n, err := unix.IoctlGetInt(int(fd), unix.TIOCINQ)
		if err != nil {
			n = 0
		}
		p.n = n
	}
	return p
}

// unread reports whether there are such bytes.
func (p *unreadProbe) unread() bool {
	p.n = 0
	_ = p.socket.Control(p.step) // fails if the connection is closed: nothing to read
	return p.n > 0
}
