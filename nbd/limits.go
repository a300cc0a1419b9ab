package nbd

import (
	"cmp"
	"time"
)

// Limits are the settings of a Server that may change while it serves. They mean
// what the fields of Server with the same names mean, zero values included.
type Limits struct {
	MaxConns            int
	MaxInflightBytes    int64
	HandshakeTimeout    time.Duration
	FirstRequestTimeout time.Duration
	IdleTimeout         time.Duration
}

// limitsOf takes the limits that a Server was configured with.
func limitsOf(s *Server) Limits {
	return Limits{
		MaxConns: s.MaxConns, MaxInflightBytes: s.MaxInflightBytes,
		HandshakeTimeout: s.HandshakeTimeout, FirstRequestTimeout: s.FirstRequestTimeout, IdleTimeout: s.IdleTimeout,
	}
}

func (l Limits) withDefaults() *Limits {
	l.MaxConns = cmp.Or(l.MaxConns, defaultMaxConns)
	l.MaxInflightBytes = cmp.Or(l.MaxInflightBytes, defaultMaxInflightBytes)
	l.HandshakeTimeout = cmp.Or(l.HandshakeTimeout, defaultHandshakeTimeout)
	l.FirstRequestTimeout = cmp.Or(l.FirstRequestTimeout, defaultFirstRequestTimeout)
	l.IdleTimeout = cmp.Or(l.IdleTimeout, defaultIdleTimeout)
	return &l
}

// SetLimits changes the limits of a Server that serves. No connection ends
// because of it: who is above a limit stays, and whatever is waited for already is
// waited for as long as it was to be.
func (s *Server) SetLimits(l Limits) {
	s.init()
	limits := l.withDefaults()
	s.limits.Store(limits)
	s.budget.resize(limits.MaxInflightBytes)
}
