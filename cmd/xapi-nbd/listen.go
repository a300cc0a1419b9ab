package main

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

// A peer that has vanished is noticed within a minute: by probes when the
// connection is quiet, by the age of unacknowledged data when it is not.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 10 * time.Second, Count: 3}

const userTimeout = time.Minute

// listenAddrs are the addresses of the configuration.
func listenAddrs(cfg config) []string {
	if len(cfg.Listen) > 0 {
		return cfg.Listen
	}
	// Without a host Go listens on IPv6 and IPv4 with one socket.
	return []string{net.JoinHostPort("", strconv.Itoa(cfg.Port))}
}

func listen(ctx context.Context, addr string) (net.Listener, error) {
	network, address, err := splitAddr(addr)
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
			serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(userTimeout.Milliseconds()))
		})
		return errors.Join(err, os.NewSyscallError("setsockopt TCP_USER_TIMEOUT", serr))
	}}
	return lc.Listen(ctx, network, address)
}

// splitAddr understands host:port, [v6]:port and unix:/path.
func splitAddr(addr string) (network, address string, err error) {
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

// removeStale removes a socket that nobody listens on, as a killed process
// leaves behind.
func removeStale(ctx context.Context, path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) || (err == nil && st.Mode().Type() != fs.ModeSocket) {
		return nil // listening will say what is wrong
	}
	if err != nil {
		return err
	}
	c, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "unix", path)
	if err == nil {
		c.Close()
		return fmt.Errorf("listen unix %s: somebody listens there already", path)
	}
	return os.Remove(path)
}
