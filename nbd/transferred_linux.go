package nbd

import (
	"net"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// transferMeter tells how many bytes a peer has taken and sent. System calls do not
// tell that: they return when the bytes are in the socket's buffer. Its methods may
// be called concurrently, also after the end of the connection.
type transferMeter struct {
	counted atomic.Int64    // payload bytes of transfers that have ended
	raw     syscall.RawConn // nil if the connection is no socket
	tcp     bool

	askUnsent func(fd uintptr) // made once, because each function literal would allocate
	unsent    atomic.Int64     // its answer
}

func newTransferMeter(nc net.Conn) *transferMeter {
	m := &transferMeter{}
	m.askUnsent = func(fd uintptr) {
		if n, err := unix.IoctlGetInt(int(fd), unix.SIOCOUTQ); err == nil {
			m.unsent.Store(int64(n))
		}
	}
	if c, ok := nc.(syscall.Conn); ok {
		if raw, err := c.SyscallConn(); err == nil {
			m.raw = raw
		}
	}
	_, m.tcp = nc.(*net.TCPConn)
	return m
}

// add counts payload bytes that were sent or received.
func (m *transferMeter) add(bytes int64) { m.counted.Add(bytes) }

// total is the payload bytes of all transfers that have ended, except for what
// the peer has not acknowledged.
func (m *transferMeter) total() int64 {
	if m.raw != nil {
		_ = m.raw.Control(m.askUnsent) // fails after the end, when it does not matter
	}
	return m.counted.Load() - m.unsent.Load()
}

// progress is how many bytes in all have been acknowledged by the peer and
// received from it, also inside a transfer; known is false if the system cannot
// tell.
func (m *transferMeter) progress() (bytes int64, known bool) {
	if !m.tcp || m.raw == nil {
		return 0, false
	}
	_ = m.raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		if err == nil && info.Bytes_received > 0 { // kernels before 4.1 do not count
			bytes, known = int64(info.Bytes_acked+info.Bytes_received), true
		}
	})
	return bytes, known
}
