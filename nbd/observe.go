package nbd

import (
	"cmp"
	"crypto/tls"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"xapi-nbd/nbd/wire"
)

// ConnStatus describes a connection that has not ended. It does not hold the name of the
// export as the client sent it, which may be secret.
type ConnStatus struct {
	ID        string
	Remote    net.Addr
	TLS       string    // the version, "" in the clear
	Since     time.Time // when it was accepted
	LastError string    // the last refused option or failed request; "" if there was none

	// Serving is true in the transmission phase. The fields below are zero before it.
	Serving       bool
	Export        string    // the canonical name of a [Namer], "" of all others
	Began         time.Time // when its transmission phase began
	Size          int64     // size of the export in bytes
	Position      int64     // the end of its last READ or WRITE in bytes; requests out of order do not move it back
	Requests      int64     // requests received
	Failed        int64     // requests that failed because the device failed
	Refused       int64     // requests that were refused without calling the device: invalid, or not permitted
	Bytes         int64     // bytes of data read or written for the peer
	Written       int64     // those of Bytes that were written
	InFlight      int       // requests in flight
	InFlightBytes int64     // bytes of memory reserved for their payloads
	// ReadStall is how long reads of the device have been running without one of them
	// ending, which may mean that its storage hangs. 0 if none is running.
	ReadStall time.Duration
}

// Totals are counters of a Server since its first connection.
type Totals struct {
	Conns    int64            // connections whose handshake began
	Requests int64            // requests received
	Failed   int64            // requests that failed because the device failed
	Refused  int64            // requests that were refused without calling the device
	Bytes    int64            // bytes of data read or written for peers
	Written  int64            // those of Bytes that were written
	Errors   map[string]int64 // requests that were answered with an error, by the name of the error
	// OptionErrors counts options that were refused, by the name of the reply.
	OptionErrors map[string]int64

	// Refusals counts refused options by rule: those of [Rules] and of [Refusal].Rule.
	// Equal refusals of one connection in a row count once, and unknown options do not
	// count.
	Refusals map[string]int64
	// Ends counts transmissions that have ended, by kind: each of [TransferEnds].
	Ends map[string]int64

	ReadLatency ReadLatency // of all devices
}

// connView is the state of a connection that Conns and Totals read. The goroutines of the
// connection only store in it, and not for every request.
type connView struct {
	accepted     time.Time
	tls          atomic.Uint32 // version, 0 in the clear
	transmission atomic.Pointer[transmission]
	lastError    atomic.Pointer[string] // see ConnStatus.LastError
}

// serverView has the counters of a Server. Connections that have not ended have their own.
type serverView struct {
	errors  tally[wire.Errno]
	refused tally[wire.OptionReply]
	rules   tally[string]
	ends    tally[string]

	conns int64    // guarded by Server.mu
	ended doneView // sum over the connections that have ended; guarded by Server.mu
}

// doneView counts the requests of one connection, or of several together.
type doneView struct {
	requests, failed, refused, bytes, written int64
	latency                                   latencySum
}

func (d *doneView) add(other doneView) {
	d.requests += other.requests
	d.failed += other.failed
	d.refused += other.refused
	d.bytes += other.bytes
	d.written += other.written
	d.latency.add(other.latency)
}

// tally counts by kind. There must be few kinds.
type tally[K comparable] struct {
	mu sync.Mutex // guards n
	n  map[K]int64
}

func (t *tally[K]) add(kind K) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.n == nil {
		t.n = make(map[K]int64)
	}
	t.n[kind]++
}

// all returns a copy of the counts, in which the given kinds are present even at 0.
func (t *tally[K]) all(kinds []K) map[K]int64 {
	all := make(map[K]int64, len(kinds))
	for _, kind := range kinds {
		all[kind] = 0
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	maps.Copy(all, t.n)
	return all
}

// named returns a copy of the counts by the names of the kinds.
func named[K interface {
	comparable
	String() string
}](t *tally[K]) map[string]int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	m := make(map[string]int64, len(t.n))
	for kind, n := range t.n {
		m[kind.String()] = n
	}
	return m
}

// Conns describes all connections, in the order in which they were accepted. It does not
// delay them.
func (s *Server) Conns() []ConnStatus {
	s.init()
	s.mu.Lock()
	conns := slices.Collect(maps.Keys(s.conns))
	s.mu.Unlock()
	// IDs are ascending numbers.
	slices.SortFunc(conns, func(a, b *conn) int {
		return cmp.Or(cmp.Compare(len(a.peer.ID), len(b.peer.ID)), cmp.Compare(a.peer.ID, b.peer.ID))
	})
	all := make([]ConnStatus, len(conns))
	for i, c := range conns {
		all[i] = c.status()
	}
	return all
}

// Totals returns the counters. They never decrease.
func (s *Server) Totals() Totals {
	s.init()
	t := Totals{
		Errors: named(&s.view.errors), OptionErrors: named(&s.view.refused),
		Refusals: s.view.rules.all(Rules()), Ends: s.view.ends.all(TransferEnds()),
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	sum := s.view.ended
	for c := range s.conns {
		sum.add(c.done())
	}
	t.Conns, t.Requests, t.Failed, t.Refused = s.view.conns, sum.requests, sum.failed, sum.refused
	t.Bytes, t.Written = sum.bytes, sum.written
	t.ReadLatency = sum.latency.export()
	return t
}

// Serving returns how many connections count against MaxConns: those in the transmission
// phase and those whose export is being opened by NBD_OPT_GO or NBD_OPT_EXPORT_NAME.
func (s *Server) Serving() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.serving
}

// Disconnect ends the connection with this [Peer].ID, and reports whether there is one. In
// the transmission phase the connection ends as if its device had been revoked, see
// [Revocable]. Calls of its device that are running return before the device is closed.
func (s *Server) Disconnect(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		if c.peer.ID == id {
			c.disconnect()
			return true
		}
	}
	return false
}

var errByAdministrator = hardDisconnect("disconnected by the administrator", nil)

// disconnect ends the connection because of Server.Disconnect.
func (c *conn) disconnect() {
	if t := c.view.transmission.Load(); t != nil {
		t.revoke(errByAdministrator)
		return
	}
	c.kill(errByAdministrator)
}

func (c *conn) status() ConnStatus {
	st := ConnStatus{ID: c.peer.ID, Remote: c.peer.Remote, Since: c.view.accepted}
	if v := c.view.tls.Load(); v != 0 {
		st.TLS = tls.VersionName(uint16(v))
	}
	if text := c.view.lastError.Load(); text != nil {
		st.LastError = *text
	}
	t := c.view.transmission.Load()
	if t == nil {
		return st
	}
	st.Serving, st.Export, st.Began = true, t.export, t.stats.begin
	st.Size, st.Position = int64(t.sess.info.Size), t.stats.position.end.Load()
	done := c.done()
	st.Requests, st.Failed, st.Refused = done.requests, done.failed, done.refused
	st.Bytes, st.Written = done.bytes, done.written
	st.InFlight, st.InFlightBytes = t.inflight.now()
	st.ReadStall = t.readTimer.stalled()
	return st
}

// done returns the counts of the connection so far.
func (c *conn) done() doneView {
	t := c.view.transmission.Load()
	if t == nil {
		return doneView{}
	}
	return doneView{t.stats.requests.Load(), t.stats.failed.Load(), t.stats.refused.Load(), t.stats.bytes.Load(), t.stats.written.Load(), t.readTimer.now()}
}

// setLastError sets ConnStatus.LastError. The text must hold no secrets.
func (c *conn) setLastError(text string) { c.view.lastError.Store(&text) }

// canonicalName returns the name of a device that may be logged, "" if there is none. The
// name that the client sent may be secret.
func canonicalName(d Device) string {
	if n, ok := unwrap(d).(Namer); ok {
		return wire.ProtocolString(n.CanonicalName())
	}
	return ""
}
