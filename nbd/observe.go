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

// ConnStatus is what can be told of a connection while it lives. It never holds
// the name that the client gave an export, which may be a secret.
type ConnStatus struct {
	ID        string
	Remote    net.Addr
	TLS       string    // the version, "" in the clear
	Since     time.Time // when it was accepted
	LastError string    // of its refused options and failed requests; "" if there was none

	// Serving: it has finished negotiation. What follows is zero before.
	Serving       bool
	Export        string    // the canonical name of a [Namer], "" of all others
	Began         time.Time // when its transmission phase began
	Size          int64     // of the export, in bytes
	Position      int64     // the offset behind its last READ; requests out of order do not move it back
	Requests      int64
	Failed        int64 // requests that the device failed
	Refused       int64 // requests that were refused without asking the device: invalid, or not permitted
	Bytes         int64 // of data that was read or written for the peer
	InFlight      int   // requests that are being served
	InFlightBytes int64 // what they may have in memory
	// ReadStall is how long reads of the device have been under way without one of
	// them ending: a hint that its storage hangs. 0 while none is under way.
	ReadStall time.Duration
}

// Totals count what a Server has done since it began to serve.
type Totals struct {
	Conns    int64 // connections that were allowed to negotiate
	Requests int64
	Failed   int64            // requests that the device failed
	Rejected int64            // requests that were refused without asking the device
	Bytes    int64            // of data that was read or written for peers
	Errors   map[string]int64 // requests that were answered with an error, by its name
	Refused  map[string]int64 // options that were refused, by the name of the reply

	// Refusals counts refusals by rule: [Rules] and those of [Refusal.Rule].
	// Equal refusals of one connection in a row are one, and options that the
	// server does not know are none.
	Refusals map[string]int64
	// Ends counts transmissions that have ended, by kind: each of [TransferEnds].
	Ends map[string]int64

	ReadLatency ReadLatency // of all devices
}

// connView is what others may look at of a connection while its own goroutines
// work: they only store here, and nothing for every request.
type connView struct {
	accepted     time.Time
	tls          atomic.Uint32 // version, 0 in the clear
	transmission atomic.Pointer[transmission]
	trouble      atomic.Pointer[string] // see ConnStatus.LastError
}

// serverView is what a Server keeps for Totals. Connections that live count for
// themselves.
type serverView struct {
	errors  tally[wire.Errno]
	refused tally[wire.OptionReply]
	rules   tally[string]
	ends    tally[string]

	conns int64    // guarded by Server.mu
	ended doneView // sum over the connections that have ended; guarded by Server.mu
}

// doneView is what a connection has done, or several together.
type doneView struct {
	requests, failed, refused, bytes int64
	latency                          latencySum
}

func (d *doneView) add(other doneView) {
	d.requests += other.requests
	d.failed += other.failed
	d.refused += other.refused
	d.bytes += other.bytes
	d.latency.add(other.latency)
}

// tally counts things by their kind. There are few kinds.
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

// all copies a tally. The kinds that are given are in it in any case.
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

// named copies a tally, by the names of the kinds.
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

// Conns tells of all connections, in the order of their coming. It holds none of
// them up.
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

// Totals tells what was done so far. The numbers never become smaller.
func (s *Server) Totals() Totals {
	s.init()
	t := Totals{
		Errors: named(&s.view.errors), Refused: named(&s.view.refused),
		Refusals: s.view.rules.all(Rules()), Ends: s.view.ends.all(TransferEnds()),
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	sum := s.view.ended
	for c := range s.conns {
		sum.add(c.done())
	}
	t.Conns, t.Requests, t.Failed, t.Rejected, t.Bytes = s.view.conns, sum.requests, sum.failed, sum.refused, sum.bytes
	t.ReadLatency = sum.latency.export()
	return t
}

// Serving is how many connections have one of MaxConns: those that have finished
// negotiation and those whose export is being opened.
func (s *Server) Serving() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.serving
}

// Disconnect cuts the connection with this ID and reports whether there is one.
// Reads that are under way end before its device is closed, as ever.
func (s *Server) Disconnect(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		if c.peer.ID == id {
			c.kill(hardDisconnect("disconnected by the administrator", nil))
			return true
		}
	}
	return false
}

func (c *conn) status() ConnStatus {
	st := ConnStatus{ID: c.peer.ID, Remote: c.peer.Remote, Since: c.view.accepted}
	if v := c.view.tls.Load(); v != 0 {
		st.TLS = tls.VersionName(uint16(v))
	}
	if text := c.view.trouble.Load(); text != nil {
		st.LastError = *text
	}
	t := c.view.transmission.Load()
	if t == nil {
		return st
	}
	st.Serving, st.Export, st.Began = true, t.export, t.stats.begin
	st.Size, st.Position = int64(t.sess.info.Size), t.stats.position.end.Load()
	done := c.done()
	st.Requests, st.Failed, st.Refused, st.Bytes = done.requests, done.failed, done.refused, done.bytes
	st.InFlight, st.InFlightBytes = t.inflight.now()
	st.ReadStall = t.readTimer.stalled()
	return st
}

// done is what the connection has done so far.
func (c *conn) done() doneView {
	t := c.view.transmission.Load()
	if t == nil {
		return doneView{}
	}
	return doneView{t.stats.requests.Load(), t.stats.failed.Load(), t.stats.refused.Load(), t.stats.bytes.Load(), t.readTimer.now()}
}

// troubled notes what went wrong last. The text holds no secrets.
func (c *conn) troubled(text string) { c.view.trouble.Store(&text) }

// canonicalName is the name of a device that is fit to be shown: what the client
// asked for is not.
func canonicalName(d Device) string {
	if n, ok := unwrap(d).(Namer); ok {
		return wire.ProtocolString(n.CanonicalName())
	}
	return ""
}
