package listenaddr_test

import (
	"errors"
	"net"
	"strings"
	"syscall"
	"testing"

	"xapi-nbd/cmd/internal/listenaddr"
)

// TestProbe: Probe has the result of Listen for every kind of address, and disturbs neither listeners nor later calls of Listen.
func TestProbe(t *testing.T) {
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	port := busy.Addr().(*net.TCPAddr).AddrPort().Port()
	addrs := []string{
		":0", "127.0.0.1:0", "0.0.0.0:0", "[::1]:0", "[::]:0", "localhost:0", busy.Addr().String(), "192.0.2.1:10809",
		"[fe80::1%nosuch0]:0", "[fe80::1]:0", (&net.TCPAddr{Port: int(port)}).String(),
	}
	for _, addr := range append(addrs, linkLocal(t)...) {
		probed := listenaddr.Probe(t.Context(), addr)
		l, err := listenaddr.Listen(t.Context(), addr)
		if err == nil {
			l.Close()
		}
		var probedErrno, errno syscall.Errno
		if (probed == nil) != (err == nil) || errors.As(probed, &probedErrno) != errors.As(err, &errno) {
			t.Errorf("%s: Probe says %v, Listen %v", addr, probed, err)
		}
	}
	// A probed address stays free, and a listener is not disturbed.
	if c, err := net.Dial("tcp", busy.Addr().String()); err != nil {
		t.Error(err)
	} else {
		c.Close()
	}
}

// linkLocal returns the addresses of this machine that have a zone.
func linkLocal(t *testing.T) (addrs []string) {
	t.Helper()
	interfaces, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range interfaces {
		all, err := i.Addrs()
		if err != nil {
			continue
		}
		for _, a := range all {
			if ip, ok := a.(*net.IPNet); ok && ip.IP.To4() == nil && ip.IP.IsLinkLocalUnicast() {
				addrs = append(addrs, net.JoinHostPort(ip.IP.String()+"%"+i.Name, "0"))
			}
		}
	}
	t.Logf("with a zone: %s", strings.Join(addrs, " "))
	return addrs
}
