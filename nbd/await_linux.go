package nbd

import (
	"net"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// awaitFor is how long a reader waits for the next request in the kernel before
// it goes to sleep in Go's scheduler. The kernel wakes a thread faster than the
// scheduler a goroutine, and without a second thread that looks for work which
// is not there: on two cores that costs the client as much as us.
const awaitFor = 200 * time.Microsecond

// awaiting counts the threads that wait so, in all servers. One may: on two
// cores a second one would leave none for everything else.
var awaiting atomic.Bool

// awaiter waits for the next request of one connection.
type awaiter struct {
	fd  int // of the socket; -1: does not apply
	hot bool
}

// newAwaiter knows TLS no better than not at all: a request may be in its buffer
// while the socket has nothing.
func newAwaiter(c *conn) awaiter {
	tcp, ok := c.raw.(*net.TCPConn)
	if !ok || c.peer.TLS != nil {
		return awaiter{fd: -1}
	}
	a := awaiter{fd: -1}
	if raw, err := tcp.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { a.fd = int(fd) })
	}
	return a
}

// await waits a little for bytes, on a connection whose last wait was worth it.
func (a *awaiter) await() {
	if a.fd < 0 || !a.hot || !awaiting.CompareAndSwap(false, true) {
		return
	}
	defer awaiting.Store(false)
	timeout := unix.NsecToTimespec(int64(awaitFor))
	fds := [1]unix.PollFd{{Fd: int32(a.fd), Events: unix.POLLIN}}
	n, err := unix.Ppoll(fds[:], &timeout, nil)
	a.hot = n > 0 && err == nil
}

// came notes that a request has come: the next one may follow at once.
func (a *awaiter) came() { a.hot = true }
