//go:build linux

package nbd

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// congestion runs a socket's TCP_CONGESTION: what it is, after setting it to name
// unless that is "".
func congestion(t *testing.T, conn syscall.Conn, name string) string {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var got string
	cerr := raw.Control(func(fd uintptr) {
		if name != "" {
			if err = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, name); err != nil {
				return
			}
		}
		got, err = unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION)
	})
	if cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	return got
}

// witness is a listener that tells when it is served, and the congestion control
// of what it accepts.
type witness struct {
	*net.TCPListener
	serving  chan struct{}
	accepted chan string
}

func (w witness) Accept() (net.Conn, error) {
	select {
	case w.serving <- struct{}{}:
	default: // not the first time
	}
	nc, err := w.TCPListener.Accept()
	if err != nil {
		return nil, err
	}
	raw, err := nc.(syscall.Conn).SyscallConn()
	if err != nil {
		return nil, err
	}
	err = raw.Control(func(fd uintptr) {
		name, _ := unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION)
		w.accepted <- name
	})
	return nc, err
}

// A connection on loopback is not paced, whatever the machine's default; no other
// choice of its administrator is touched, nor one for who may come over a network.
func TestDropPacing(t *testing.T) {
	b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
	if errors.Is(err, fs.ErrNotExist) { // in older kernels' further network namespaces
		b = []byte(unpaced)
	} else if err != nil {
		t.Fatal(err)
	}
	for _, name := range strings.Fields(string(b)) {
		for _, host := range []string{"127.0.0.1", "::1", "0.0.0.0"} {
			t.Run(name+"/"+host, func(t *testing.T) {
				nl, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
				if err != nil {
					t.Skip("no such address here:", err)
				}
				l := witness{nl.(*net.TCPListener), make(chan struct{}, 1), make(chan string, 1)}
				congestion(t, l, name)
				serveOn(t, &Server{Exporter: oneDevice{cheapDevice(1 << 20)}}, l)
				<-l.serving
				dialGo(t, l)
				want := name
				if paces(name) && host != "0.0.0.0" {
					want = unpaced
				}
				if got := <-l.accepted; got != want {
					t.Errorf("the connection has %s, want %s", got, want)
				}
			})
		}
	}
}

func TestPaces(t *testing.T) {
	for name, want := range map[string]bool{"bbr": true, "bbr3": true, "cubic": false, "reno": false} {
		if got := paces(name); got != want {
			t.Errorf("%s: got %v", name, got)
		}
	}
}
