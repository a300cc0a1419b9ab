package listenaddr

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// errProbed ends a Probe before the listen call.
var errProbed = errors.New("bound, not listening")

// Probe reports whether [Listen] would succeed on a TCP address, host:port or
// [v6%zone]:port, now: it makes the same socket and binds it, but does not listen. So no
// client can connect, and a service that starts meanwhile can bind too.
func Probe(ctx context.Context, address string) error {
	lc := net.ListenConfig{Control: func(network, resolved string, c syscall.RawConn) error {
		var berr error
		err := c.Control(func(fd uintptr) { berr = bind(int(fd), network, resolved) })
		if err = errors.Join(err, berr); err != nil {
			return err
		}
		return errProbed
	}}
	l, err := lc.Listen(ctx, "tcp", address)
	switch {
	case errors.Is(err, errProbed):
		return nil
	case err == nil:
		l.Close() // cannot happen: Control is always called
	}
	return err
}

// bind binds a socket that package net has made, to a resolved address.
func bind(fd int, network, resolved string) error {
	addr, err := netip.ParseAddrPort(resolved)
	if err != nil {
		// Without a host package net means all addresses, and says ":port".
		_, port, serr := net.SplitHostPort(resolved)
		number, perr := strconv.ParseUint(port, 10, 16)
		if serr != nil || perr != nil {
			return err
		}
		addr = netip.AddrPortFrom(netip.IPv6Unspecified(), uint16(number))
		if network == "tcp4" {
			addr = netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(number))
		}
	}
	if network == "tcp4" {
		return os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().Unmap().As4()}))
	}
	zone, err := zoneIndex(addr.Addr().Zone())
	if err != nil {
		return err
	}
	return os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrInet6{Port: int(addr.Port()), Addr: addr.Addr().As16(), ZoneId: zone}))
}

// zoneIndex returns the interface index of a zone, which is a name or a number; 0 without a zone.
func zoneIndex(zone string) (uint32, error) {
	if zone == "" {
		return 0, nil
	}
	if i, err := net.InterfaceByName(zone); err == nil {
		return uint32(i.Index), nil
	}
	index, err := strconv.ParseUint(zone, 10, 32)
	if err != nil {
		return 0, unix.ENODEV
	}
	return uint32(index), nil
}
