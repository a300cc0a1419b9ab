// Package nbd is a server of the NBD protocol over any [net.Conn]; package nbd/client is
// a client. It has fixed newstyle negotiation with TLS, and the transmission phase
// with many requests in flight.
//
// It knows nothing of what it serves. A [Server] asks its [Exporter] for a
// [Device] when a client names an export (NBD_OPT_INFO, NBD_OPT_GO,
// NBD_OPT_EXPORT_NAME) and never earlier, so that a stranger causes no work;
// what a device can do beyond being read it says by optional one-method
// interfaces, asked once.
//
// The way of a connection: [Server.Serve] accepts, negotiate.go haggles and
// ends with an immutable session, transmission.go serves requests until a
// disconnect, and the device is closed when no read of it runs any more.
//
// Served are all options and commands of the protocol but PEEK_EXPORT and RESIZE,
// which it has withdrawn or never finished; docs/PROTOCOL.md lists them. LIST is
// refused by policy. Each option has a file opt_*.go, each command a file
// cmd_*.go.
package nbd
