package nbd

import (
	"slices"
	"sync"
	"time"
)

// evictAfter is how long a peer may keep the server waiting during its handshake
// before its connection may be ended to make room for another one.
const evictAfter = time.Second

// handshakes are the connections of a server that have not finished negotiation,
// and those that wait to begin it. Strangers can make them for nothing, so their
// number is limited, without locking out clients:
//
//   - A connection that waits for the program, in TLSPolicy or Exporter, does not
//     count and is never ended: the peer has done its part.
//   - A connection is ended to make room only if its peer has kept the server
//     waiting for evictAfter, all waits added up.
//   - At MaxHandshakes a new connection waits until there is room. Addresses with
//     few connections come first, and only the address with the most makes room, so
//     one address cannot take all the room from the others.
//   - An address with more than MaxHandshakesPerHost makes room for its own new
//     connections, as far as the rule above allows.
//
// Its lock may be taken while that of the server is held, not the other way round.
type handshakes struct {
	limits func() *Limits // those in force

	mu      sync.Mutex         // guards what follows, and handshake of every conn
	closed  bool               // no connection is admitted any more
	active  map[*conn]struct{} // in the phase phaseActive
	opening int                // connections in the phase phaseOpening
	perHost map[string]int     // active ones, by address
	queue   []*newcomer        // in the order of arrival
	timer   *time.Timer        // looks at the queue again; nil while it is empty
}

// handshakePhase is how a connection counts.
type handshakePhase int

const (
	phaseOutside handshakePhase = iota // not admitted yet, or negotiation has ended
	phaseActive                        // negotiates
	phaseOpening                       // waits for TLSPolicy or Exporter
)

// newcomer is a connection that waits to be admitted.
type newcomer struct {
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

// admit waits until the connection may negotiate. Each success needs a finish.
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
	n := &newcomer{c: c, arrived: time.Now(), result: make(chan error, 1)}
	h.queue = append(h.queue, n)
	if len(h.queue) > h.limits().MaxHandshakes {
		h.refuseOne()
	}
	h.serveQueue()
	h.mu.Unlock()
	return <-n.result
}

// hasRoom reports whether one more may begin; h.mu is held.
func (h *handshakes) hasRoom() bool {
	l := h.limits()
	return len(h.active) < l.MaxHandshakes && len(h.active)+h.opening < l.MaxHandshakes+l.MaxConns
}

// enter makes a connection an active one; h.mu is held.
func (h *handshakes) enter(c *conn) {
	c.handshake = phaseActive
	h.active[c] = struct{}{}
	h.perHost[c.host]++
}

// exit is the end of enter; h.mu is held.
func (h *handshakes) exit(c *conn) {
	delete(h.active, c)
	if h.perHost[c.host]--; h.perHost[c.host] == 0 {
		delete(h.perHost, c.host)
	}
}

// beginOpening notes that a connection waits for the program, not for its peer.
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

// endOpening is the end of beginOpening. It does not wait for room.
func (h *handshakes) endOpening(c *conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if c.handshake == phaseOpening {
		h.opening--
		h.enter(c)
	}
}

// finish is called when the negotiation of a connection has ended, with an export
// or without. It may be called again.
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

// close refuses all that wait, and those to come.
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

// serveQueue admits those for whom there is room, and makes room where it may;
// h.mu is held.
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

// next is the index of the newcomer that is the next to be admitted: of the address
// with the fewest connections, the one that came first. h.mu is held.
func (h *handshakes) next() int {
	best := 0
	for i, n := range h.queue {
		if h.perHost[n.c.host] < h.perHost[h.queue[best].c.host] {
			best = i
		}
	}
	return best
}

// refuseOne refuses the last newcomer of the address that has the most of them;
// h.mu is held.
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
	n.result <- hardDisconnect("too many connections wait to negotiate", nil)
}

// evictFrom makes room among the connections of an address that has its share of
// them, if one may be ended; h.mu is held.
func (h *handshakes) evictFrom(host string) {
	if host != "" && h.perHost[host] >= h.limits().MaxHandshakesPerHost {
		h.evict(h.victim(func(c *conn) bool { return c.host == host }))
	}
}

// evictFromLargest makes room among the connections of the address that has the
// most, and reports whether one could be ended; h.mu is held.
func (h *handshakes) evictFromLargest() bool {
	most := 0
	for _, n := range h.perHost {
		most = max(most, n)
	}
	return h.evict(h.victim(func(c *conn) bool { return h.perHost[c.host] == most }))
}

// victim is the one of some connections that has kept the server waiting longest,
// nil if none of them may be ended. h.mu is held.
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

// evict ends a connection and reports whether there was one; h.mu is held.
func (h *handshakes) evict(c *conn) bool {
	if c == nil {
		return false
	}
	h.drop(c)
	c.kill(hardDisconnect("made room for a newer connection: too many are negotiating, and this one kept the server waiting", nil))
	return true
}

// nextLook is after how long it pays to try again to make room; h.mu is held.
func (h *handshakes) nextLook() time.Duration {
	now, next := time.Now(), evictAfter
	for c := range h.active {
		if left := evictAfter - c.waitedFor(now); left > 0 {
			next = min(next, left)
		}
	}
	return next
}

// schedule has the queue looked at after d, 0 for never; h.mu is held.
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

func (h *handshakes) look() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.serveQueue()
}
