package sock

import (
	"net"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// Meter counts the bytes that a peer has received and sent. A write(2) that has returned
// does not mean that the peer has received the bytes: they may still be in the buffer of
// the socket. The methods may be called concurrently, also after the connection is closed.
type Meter struct {
	counted atomic.Int64    // see Add
	raw     syscall.RawConn // nil if the connection is no socket
	tcp     bool

	queryUnsent func(fd uintptr) // sets unsent; made once, because a function literal allocates
	unsent      atomic.Int64     // bytes in the send buffer that the peer has not acknowledged
}

// NewMeter returns a Meter for a connection.
func NewMeter(nc net.Conn) *Meter {
	m := &Meter{raw: rawConn(nc)}
	_, m.tcp = nc.(*net.TCPConn)
	m.queryUnsent = func(fd uintptr) {
		if n, err := unix.IoctlGetInt(int(fd), unix.SIOCOUTQ); err == nil {
			m.unsent.Store(int64(n))
		}
	}
	return m
}

// Add counts payload bytes of a transfer that has ended, in either direction.
func (m *Meter) Add(bytes int64) { m.counted.Add(bytes) }

// Total returns the sum of all Adds, without the bytes that the peer has not acknowledged.
// Without a socket these bytes are included.
func (m *Meter) Total() int64 {
	if m.raw != nil {
		_ = m.raw.Control(m.queryUnsent) // an error means that the connection is closed
	}
	return m.counted.Load() - m.unsent.Load()
}

// Progress returns the number of bytes that the peer has acknowledged and sent since the
// connection was made. Unlike Total it includes transfers that have not ended. known is
// false if the system does not have this number: for connections that are not TCP.
func (m *Meter) Progress() (bytes int64, known bool) {
	if !m.tcp || m.raw == nil {
		return 0, false
	}
	_ = m.raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		if err == nil && info.Bytes_received > 0 { // always 0 before Linux 4.1
			bytes, known = int64(info.Bytes_acked+info.Bytes_received), true
		}
	})
	return bytes, known
}

// rawConn returns nil if the connection is no socket or is closed.
func rawConn(nc net.Conn) syscall.RawConn {
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil
	}
	return raw
}
