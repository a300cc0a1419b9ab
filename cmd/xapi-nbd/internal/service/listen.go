package service

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"xapi-nbd/cmd/internal/listenaddr"
)

// neverListen are the errors after which no later attempt can succeed. EINVAL is returned
// for a unix path that is too long, and for a link-local address without a zone.
var neverListen = []syscall.Errno{
	syscall.EACCES, syscall.EPERM, syscall.EAFNOSUPPORT, syscall.EINVAL,
	syscall.ENOTDIR, syscall.ENAMETOOLONG, syscall.ELOOP,
}

// listenError returns the error of a failed attempt to listen on addr. It matches ErrListen if
// no later attempt can succeed.
func listenError(addr string, err error) error {
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		if st, serr := os.Lstat(path); serr == nil && st.Mode().Type() != os.ModeSocket {
			return &kindError{ErrListen, fmt.Errorf("listen unix %s: the file there is not a socket", path)}
		}
	}
	if zone := missingZone(addr); zone != "" {
		return fmt.Errorf("listen %s: there is no interface %s", addr, zone)
	}
	if slices.ContainsFunc(neverListen, func(errno syscall.Errno) bool { return errors.Is(err, errno) }) {
		return &kindError{ErrListen, err}
	}
	return err
}

// missingZone returns the zone of an IPv6 address if no interface has that name, else "".
// The kernel's error for it is EINVAL, although the interface may appear later.
func missingZone(addr string) string {
	host, _, err := net.SplitHostPort(addr)
	_, zone, found := strings.Cut(host, "%")
	if err != nil || !found {
		return ""
	}
	if _, err := net.InterfaceByName(zone); err == nil {
		return ""
	}
	if index, err := strconv.Atoi(zone); err == nil {
		if _, err := net.InterfaceByIndex(index); err == nil {
			return ""
		}
	}
	return zone
}

// listenOn listens on one address of the configuration, see listenError.
func listenOn(ctx context.Context, addr string) (net.Listener, error) {
	l, err := listenaddr.Listen(ctx, addr)
	if err != nil {
		return nil, listenError(addr, err)
	}
	return l, nil
}
