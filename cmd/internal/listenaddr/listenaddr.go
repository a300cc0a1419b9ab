package listenaddr

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// keepAlive and UserTimeout end the connection of a peer that is no longer reachable within
// a minute: keepAlive by probes of an idle connection, UserTimeout by the age of data that
// the peer has not acknowledged.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 10 * time.Second, Count: 3}

// UserTimeout is the TCP_USER_TIMEOUT of accepted connections.
const UserTimeout = time.Minute

// staleTimeout bounds the attempt to connect to a unix socket that exists.
const staleTimeout = time.Second

// Listen listens on an address in the form of [Split]. It replaces the unix socket of a
// process that was killed; if a process listens on the socket the error matches
// [syscall.EADDRINUSE]. The caller closes the listener.
func Listen(ctx context.Context, addr string) (net.Listener, error) {
	network, address, err := Split(addr)
	if err != nil {
		return nil, err
	}
	if network == "unix" {
		if err := removeStale(ctx, address); err != nil {
			return nil, err
		}
	}
	lc := net.ListenConfig{KeepAliveConfig: keepAlive, Control: func(network, _ string, c syscall.RawConn) error {
		if !strings.HasPrefix(network, "tcp") {
			return nil
		}
		// Accepted sockets inherit it.
		var serr error
		err := c.Control(func(fd uintptr) {
			serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(UserTimeout.Milliseconds()))
		})
		return errors.Join(err, os.NewSyscallError("setsockopt TCP_USER_TIMEOUT", serr))
	}}
	return lc.Listen(ctx, network, address)
}

// Split returns the network and the address of host:port, [v6]:port or
// unix:/path, as package net takes them. The port is a number.
func Split(addr string) (network, address string, err error) {
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		if path == "" {
			return "", "", fmt.Errorf("%q has no path", addr)
		}
		return "unix", path, nil
	}
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return "", "", fmt.Errorf("%q is neither host:port, [v6]:port nor unix:/path", addr)
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return "", "", fmt.Errorf("%q has no valid port", addr)
	}
	return "tcp", addr, nil
}

// removeStale removes a unix socket on which no process listens, such as that of a killed
// process. Only a refused connection proves that: after another error, such as a full
// backlog, a process may listen.
func removeStale(ctx context.Context, path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) || (err == nil && st.Mode().Type() != fs.ModeSocket) {
		return nil // the listen call returns the error
	}
	if err != nil {
		return err
	}
	c, err := (&net.Dialer{Timeout: staleTimeout}).DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		c.Close()
	case errors.Is(err, syscall.ECONNREFUSED):
		return os.Remove(path)
	case !errors.Is(err, syscall.EAGAIN):
		return err
	}
	return fmt.Errorf("listen unix %s: another process listens there: %w", path, syscall.EADDRINUSE)
}
