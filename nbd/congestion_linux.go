package nbd

import (
	"net"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// unpaced is the congestion control for connections that need none; every kernel
// has it.
const unpaced = "reno"

// paces reports whether a congestion control spreads what it sends over time.
func paces(name string) bool { return strings.HasPrefix(name, "bbr") }

// dropPacing keeps the connections of a listener from being paced if it is bound
// to loopback, so that all its peers are on this machine: there is no bottleneck
// between them to find, and BBR's timers took 40 % of the server's CPU time and a
// third of the throughput. Pacing cannot be left by a connection that has begun
// with it, so the listener has to. It is for speed only: that it fails harms
// nothing.
func dropPacing(l net.Listener) {
	addr, ok := l.Addr().(*net.TCPAddr)
	if !ok || !addr.IP.IsLoopback() {
		return
	}
	conn, ok := l.(syscall.Conn)
	if !ok {
		return
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		name, err := unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION)
		if err == nil && paces(name) {
			_ = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, unpaced)
		}
	})
}
