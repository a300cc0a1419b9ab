// Package nbd is a server and a client of the NBD protocol over any
// [net.Conn]: fixed newstyle negotiation with TLS, and the transmission phase
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
// Served at present: EXPORT_NAME, ABORT, LIST (refused by policy), STARTTLS,
// INFO, GO; READ and DISC. Structured replies, metadata contexts, extended
// headers and writing are refused as the protocol wants it.
package nbd
