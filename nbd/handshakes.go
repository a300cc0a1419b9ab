package nbd

import (
	"slices"
	"sync"
	"time"
)

// evictAfter is how long the server must have waited for a peer during its handshake before
// it may close the connection to make room for another one.
const evictAfter = time.Second

// handshakes are the connections of a server that are in the handshake or wait to begin
// it. Anybody can open such connections, so their number is limited, without excluding
// clients:
//
//   - A connection does not count while it waits for TLSPolicy or Exporter, and is then
//     never closed: the peer cannot speed that up.
//   - A connection is closed to make room only if the server has waited for its peer for
//     at least evictAfter, all waits added up.
//   - At MaxHandshakes a new connection waits until there is room. Addresses with few
//     connections come first, and only the address with the most connections loses one, so
//     one address cannot exclude the others.
//   - If an address has MaxHandshakesPerHost and opens another connection, one of its own
//     is closed, if the second rule allows it.
//
// h.mu may be locked while Server.mu is held, not the other way round.
type handshakes struct {
	limits func() *Limits // those in force

	mu      sync.Mutex         // guards the fields below, and handshake of every conn
	closed  bool               // no connection is admitted any more
	active  map[*conn]struct{} // in the phase phaseActive
	opening int                // connections in the phase phaseOpening
	perHost map[string]int     // active ones, by address
	queue   []*queuedConn      // in the order of arrival
	timer   *time.Timer        // calls look; nil while the queue is empty
}

// handshakePhase is the state of a connection in handshakes.
type handshakePhase int

const (
	phaseOutside handshakePhase = iota // not admitted yet, or the handshake has ended
	phaseActive                        // in the handshake
	phaseOpening                       // waits for TLSPolicy or Exporter
)

// queuedConn is a connection that waits to be admitted.
type queuedConn struct {
	c       *conn
	arrived time.Time
	result  chan error // buffered; nil: admitted
}

func newHandshakes(limits func() *Limits) *handshakes {
	return &handshakes{
		limits:  limits,
		active:  make(map[*conn]struct{}),
		perHost: make(map[string]int),
	}
}

// admit waits until the connection may begin its handshake. If it returns nil, the caller
// must call finish later.
func (h *handshakes) admit(c *conn) error {
	h.mu.Lock()
	switch {
	case h.closed:
		h.mu.Unlock()
		return ErrServerClosed
	case len(h.queue) == 0 && h.hasRoom():
		h.evictFrom(c.host)
		h.enter(c)
		h.mu.Unlock()
		return nil
	}
	n := &queuedConn{c: c, arrived: time.Now(), result: make(chan error, 1)}
	h.queue = append(h.queue, n)
	if len(h.queue) > h.limits().MaxHandshakes {
		h.refuseOne()
	}
	h.serveQueue()
	h.mu.Unlock()
	return <-n.result
}

// hasRoom reports whether one more handshake may begin; h.mu is held.
func (h *handshakes) hasRoom() bool {
	l := h.limits()
	return len(h.active) < l.MaxHandshakes && len(h.active)+h.opening < l.MaxHandshakes+l.MaxConns
}

// enter counts a connection as active; h.mu is held.
func (h *handshakes) enter(c *conn) {
	c.handshake = phaseActive
	h.active[c] = struct{}{}
	h.perHost[c.host]++
}

// exit undoes enter; h.mu is held.
func (h *handshakes) exit(c *conn) {
	delete(h.active, c)
	if h.perHost[c.host]--; h.perHost[c.host] == 0 {
		delete(h.perHost, c.host)
	}
}

// beginOpening records that a connection waits for TLSPolicy or Exporter.
func (h *handshakes) beginOpening(c *conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if c.handshake == phaseActive {
		h.exit(c)
		c.handshake = phaseOpening
		h.opening++
		h.serveQueue()
	}
}

// endOpening undoes beginOpening. It does not wait for room.
func (h *handshakes) endOpening(c *conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if c.handshake == phaseOpening {
		h.opening--
		h.enter(c)
	}
}

// finish records that the handshake of a connection has ended, with an export or without.
// It may be called again.
func (h *handshakes) finish(c *conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.drop(c)
	h.serveQueue()
}

// drop stops counting a connection; h.mu is held.
func (h *handshakes) drop(c *conn) {
	switch c.handshake {
	case phaseOpening:
		h.opening--
	case phaseActive:
		h.exit(c)
	case phaseOutside:
	}
	c.handshake = phaseOutside
}

// close refuses all connections that wait, and all later ones.
func (h *handshakes) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for _, n := range h.queue {
		n.result <- ErrServerClosed
	}
	h.queue = nil
	h.schedule(0)
}

// serveQueue admits waiting connections while there is room, and makes room if the rules
// allow it; h.mu is held.
func (h *handshakes) serveQueue() {
	for len(h.queue) > 0 {
		next := h.next()
		n := h.queue[next]
		h.evictFrom(n.c.host)
		for !h.hasRoom() {
			if !h.evictFromLargest() {
				h.schedule(h.nextLook())
				return
			}
		}
		h.queue = slices.Delete(h.queue, next, next+1)
		h.enter(n.c)
		n.result <- nil
	}
	h.schedule(0)
}

// next returns the index of the connection that is admitted next: the first one of the
// address with the fewest active connections. h.mu is held.
func (h *handshakes) next() int {
	best := 0
	for i, n := range h.queue {
		if h.perHost[n.c.host] < h.perHost[h.queue[best].c.host] {
			best = i
		}
	}
	return best
}

// refuseOne refuses the last connection in the queue of the address that has the most
// there; h.mu is held.
func (h *handshakes) refuseOne() {
	queued := make(map[string]int)
	for _, n := range h.queue {
		queued[n.c.host]++
	}
	worst := 0
	for i, n := range h.queue {
		if queued[n.c.host] >= queued[h.queue[worst].c.host] {
			worst = i
		}
	}
	n := h.queue[worst]
	h.queue = slices.Delete(h.queue, worst, worst+1)
	n.result <- hardDisconnect("too many connections wait for their handshake", nil)
}

// evictFrom closes a connection of an address that has reached MaxHandshakesPerHost, if the
// rules allow it; h.mu is held.
func (h *handshakes) evictFrom(host string) {
	if host != "" && h.perHost[host] >= h.limits().MaxHandshakesPerHost {
		h.evict(h.victim(func(c *conn) bool { return c.host == host }))
	}
}

// evictFromLargest closes a connection of the address that has the most, if the rules allow
// it, and reports whether it did; h.mu is held.
func (h *handshakes) evictFromLargest() bool {
	most := 0
	for _, n := range h.perHost {
		most = max(most, n)
	}
	return h.evict(h.victim(func(c *conn) bool { return h.perHost[c.host] == most }))
}

// victim returns the connection for whose peer the server has waited longest, nil if none
// may be closed. Only those for which among returns true are considered. h.mu is held.
func (h *handshakes) victim(among func(*conn) bool) *conn {
	now := time.Now()
	var victim *conn
	longest := evictAfter - 1
	for c := range h.active {
		if waited := c.waitedFor(now); waited > longest && among(c) {
			victim, longest = c, waited
		}
	}
	return victim
}

// evict closes a connection and reports whether c is not nil; h.mu is held.
func (h *handshakes) evict(c *conn) bool {
	if c == nil {
		return false
	}
	h.drop(c)
	c.kill(hardDisconnect("made room for a newer connection: too many handshakes, and the server has waited long for this peer", nil))
	return true
}

// nextLook returns after how long a connection may be closed at the earliest; h.mu is held.
func (h *handshakes) nextLook() time.Duration {
	now, next := time.Now(), evictAfter
	for c := range h.active {
		if left := evictAfter - c.waitedFor(now); left > 0 {
			next = min(next, left)
		}
	}
	return next
}

// schedule sets the timer to call look after d, 0 for never; h.mu is held.
func (h *handshakes) schedule(d time.Duration) {
	switch {
	case d == 0 && h.timer != nil:
		h.timer.Stop()
		h.timer = nil
	case d == 0:
	case h.timer == nil:
		h.timer = time.AfterFunc(d, h.look)
	default:
		h.timer.Reset(d)
	}
}

// look serves the queue.
func (h *handshakes) look() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.serveQueue()
}
