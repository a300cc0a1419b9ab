// Package listenaddr listens on the addresses of flags and configuration files:
// host:port, [v6]:port, [v6%zone]:port and unix:/path.
package listenaddr
