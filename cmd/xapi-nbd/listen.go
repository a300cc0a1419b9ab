package main

import (
	"net"
	"strconv"
)

// listenAddrs are the addresses of the configuration.
func listenAddrs(cfg config) []string {
	if len(cfg.Listen) > 0 {
		return cfg.Listen
	}
	// Without a host Go listens on IPv6 and IPv4 with one socket.
	return []string{net.JoinHostPort("", strconv.Itoa(cfg.Port))}
}
