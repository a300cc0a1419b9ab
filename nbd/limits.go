package nbd

import (
	"cmp"
	"time"
)

// Limits bounds what the peers of a Server may use. A zero field means its default.
type Limits struct {
	// MaxConns limits the connections that have finished the handshake. Default 256.
	// At the limit, NBD_OPT_GO and NBD_OPT_EXPORT_NAME are refused.
	MaxConns int

	// MaxInflight limits the requests in flight of one connection. Default 64. At the
	// limit the server reads no further request of that connection. A change applies to
	// connections whose transmission phase begins later.
	MaxInflight int

	// MaxInflightBytes limits the memory, in bytes, for the payloads of all connections
	// together. Each connection has 256 KiB in addition. Default 64 MiB. Any connection
	// may use the first half of it, and only connections that make progress the second
	// half. A request for which there is no memory waits for the other requests of its
	// own connection, never for another connection; when none of them is left, it is
	// served in pieces of 256 KiB. If requests lack memory, the server closes connections
	// that hold memory and whose peer has neither acknowledged nor sent a byte for 10 s.
	MaxInflightBytes int64

	// HandshakeTimeout limits how long the server waits for the peer during the
	// handshake, all waits added up. Default 10 s. Time spent in TLSPolicy and Exporter
	// does not count. A change applies to connections that are accepted later.
	HandshakeTimeout time.Duration

	// MaxOptions limits the options of one handshake. Default 512, which is enough for a
	// client that tries each option for fifty exports.
	MaxOptions int

	// MaxHandshakeBytes limits the bytes that a peer may send during the handshake,
	// without the overhead of TLS. Default 1 MiB. A change applies to connections that
	// are accepted later.
	MaxHandshakeBytes int64

	// MaxHandshakes and MaxHandshakesPerHost limit the connections in the handshake, in
	// all and for each peer address. Defaults 512 and 32. These connections do not count
	// against MaxConns, and they do not count here while they wait for TLSPolicy or
	// Exporter. At MaxHandshakes, new connections wait until there is room; as many as
	// MaxHandshakes may wait. The server closes a connection to make room only if its
	// peer has kept the server waiting for at least a second, and only at MaxHandshakes
	// or when an address at MaxHandshakesPerHost opens another connection.
	MaxHandshakes, MaxHandshakesPerHost int

	// FirstRequestTimeout limits how long the server waits for the first request of a
	// connection. Default 60 s.
	FirstRequestTimeout time.Duration

	// IdleTimeout limits how long a connection may have no request in flight. Default
	// 1 h.
	IdleTimeout time.Duration

	// WriteTimeout limits how long a peer may take to receive a reply or to send a
	// payload, plus a second for every 256 KiB of it. Default 60 s.
	WriteTimeout time.Duration
}

// withDefaults returns a copy of l in which no field is zero.
func (l Limits) withDefaults() *Limits {
	return &Limits{
		MaxConns:             cmp.Or(l.MaxConns, 256),
		MaxInflight:          cmp.Or(l.MaxInflight, 64),
		MaxInflightBytes:     cmp.Or(l.MaxInflightBytes, 64<<20),
		HandshakeTimeout:     cmp.Or(l.HandshakeTimeout, 10*time.Second),
		MaxOptions:           cmp.Or(l.MaxOptions, 512),
		MaxHandshakeBytes:    cmp.Or(l.MaxHandshakeBytes, 1<<20),
		MaxHandshakes:        cmp.Or(l.MaxHandshakes, 512),
		MaxHandshakesPerHost: cmp.Or(l.MaxHandshakesPerHost, 32),
		FirstRequestTimeout:  cmp.Or(l.FirstRequestTimeout, time.Minute),
		IdleTimeout:          cmp.Or(l.IdleTimeout, time.Hour),
		WriteTimeout:         cmp.Or(l.WriteTimeout, time.Minute),
	}
}

// SetLimits replaces the limits of a Server, also while it serves. It closes no
// connection: connections above a new limit stay, and a wait that has begun keeps its
// timeout. It may be called concurrently with all other methods.
func (s *Server) SetLimits(l Limits) {
	s.init()
	limits := l.withDefaults()
	s.limits.Store(limits)
	s.budget.resize(limits.MaxInflightBytes)
	s.handshakes.look()
}
