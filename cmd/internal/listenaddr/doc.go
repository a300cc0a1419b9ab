// Package listenaddr listens on the addresses of flags and configuration files:
// host:port, [v6]:port, [v6%zone]:port and unix:/path. It also returns the sockets that
// systemd passed in their place.
package listenaddr
