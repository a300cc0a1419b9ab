package nbd

import (
	"cmp"
	"slices"
	"sync"
	"time"
)

const (
	// reserveSize is the memory, in bytes, that each connection has for itself. It is not
	// part of the budget, so no other connection can use it.
	reserveSize = 256 << 10

	// stuckAfter is how long a connection may hold memory without progress while others
	// need it. It is long because a receiver that reads slowly may acknowledge nothing for
	// seconds: TCP announces new room only when a sixteenth of the buffer is free.
	stuckAfter = 10 * time.Second
	// stuckLook is the shortest time between two searches for such connections.
	stuckLook = time.Second
)

// byteBudget limits the memory for the payloads of all connections: size bytes that they
// share, and reserveSize for each of them.
//
// The first request of a connection never waits. If it does not get all of its
// memory at once, it is served in pieces, within the connection's reserve.
// Further requests wait until there is memory or until the connection has
// nothing else in service. docs/ARCHITECTURE.md, "The budget", says why a
// connection that makes progress is never held up by one that does not.
type byteBudget struct {
	mu       sync.Mutex // guards the fields below and the guarded fields of every inflight
	size     int64
	used     int64
	conns    map[*inflight]struct{}
	devices  map[string]*deviceShare
	queue    []*waiter // in order of arrival; one for each connection at most
	lastLook time.Time // when stuck looked last
}

// deviceShare counts the bytes of the budget that the connections of one device
// hold because the device has not delivered or stored them yet.
type deviceShare struct {
	name    string
	conns   int
	pending int64
}

// waiter is a request that waits for memory. Its connection reads no further request
// meanwhile.
type waiter struct {
	i     *inflight
	bytes int64
	phase phase
	grant grant
	ready chan struct{} // closed when grant is set
}

// memory is the kind of memory that a request uses.
type memory int

const (
	inReserve memory = iota // a part of the connection's reserve
	inPieces                // all of the reserve, for one piece after the other
	inBudget                // a part of the budget
)

// phase is the event for which a request waits while it holds memory.
type phase int

const (
	withPeer phase = iota // for the peer to send the payload or to receive the reply
	atDevice              // for the device
)

// grant is the permission to serve one request. inflight.end gives it back.
type grant struct {
	bytes  int64
	memory memory
	phase  phase
}

func newByteBudget(size int64) *byteBudget {
	return &byteBudget{size: size, conns: make(map[*inflight]struct{}), devices: make(map[string]*deviceShare)}
}

// add registers a connection. Connections with the same device name have one deviceShare.
func (b *byteBudget) add(i *inflight, device string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.conns[i] = struct{}{}
	d := b.devices[device]
	if d == nil {
		d = &deviceShare{name: device}
		b.devices[device] = d
	}
	d.conns++
	i.device = d
}

// remove removes a connection that has no request in flight.
func (b *byteBudget) remove(i *inflight) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.conns, i)
	if i.device.conns--; i.device.conns == 0 {
		delete(b.devices, i.device.name)
	}
}

// resize changes the size. If more is in use than the new size, requests wait until enough
// has been given back.
func (b *byteBudget) resize(size int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.size = size
	b.serveQueue()
}

// take gives a request its memory, if that is possible now; b.mu is held. short reports
// whether the connection would have got more if other connections held less.
func (b *byteBudget) take(i *inflight, bytes int64, p phase) (g grant, granted, short bool) {
	g = grant{bytes: bytes, phase: p}
	switch {
	case i.n >= i.maxRequests:
		return g, false, false
	case i.reserved+bytes <= reserveSize:
		g.memory = inReserve
		i.reserved += bytes
	case b.fits(i, bytes):
		g.memory = inBudget
		b.hold(i, &g)
	case i.n == 0:
		g.memory = inPieces
		i.reserved = reserveSize
		short = true
	default:
		return g, false, i.taken+bytes <= i.window()
	}
	i.n++
	return g, true, short
}

// fits reports whether a request may have memory of the budget now; b.mu is held. Any
// connection may use the first half. In the second half a connection, and all requests that
// wait for one device, may hold no more than half of what is free afterwards, so that some
// memory is left however many connections stall; and a connection may hold no more than its
// window.
func (b *byteBudget) fits(i *inflight, bytes int64) bool {
	free := b.size - b.used - bytes // afterwards
	switch {
	case free < 0:
		return false
	case free >= b.size/2:
		return true
	case i.device.pending > 0 && i.device.pending+bytes > free/2:
		return false
	}
	return i.taken+bytes <= min(i.window(), free/2)
}

// hold counts memory of the budget as used; b.mu is held.
func (b *byteBudget) hold(i *inflight, g *grant) {
	b.used += g.bytes
	b.enter(i, g)
	i.taken += g.bytes
}

// enter counts memory where it waits now; b.mu is held.
func (b *byteBudget) enter(i *inflight, g *grant) {
	if g.phase == atDevice {
		i.pending += g.bytes
		i.device.pending += g.bytes
	} else if i.withPeer() == 0 {
		i.seenAt = time.Time{} // the peer has had nothing to do until now
	}
}

// leaveDevice is the end of that; b.mu is held.
func (b *byteBudget) leaveDevice(i *inflight, g *grant) {
	i.pending -= g.bytes
	i.device.pending -= g.bytes
}

// move changes the phase of a request; b.mu is held.
func (b *byteBudget) move(i *inflight, g *grant, p phase) {
	g.phase = p
	b.enter(i, g)
	if p == withPeer {
		b.leaveDevice(i, g)
		b.serveQueue()
	}
}

// giveBack ends a request; b.mu is held.
func (b *byteBudget) giveBack(i *inflight, g *grant) {
	i.n--
	switch g.memory {
	case inReserve:
		i.reserved -= g.bytes
	case inPieces:
		i.reserved = 0
	case inBudget:
		i.taken -= g.bytes
		b.used -= g.bytes
		if g.phase == atDevice {
			b.leaveDevice(i, g)
		}
	}
	b.serveQueue()
}

// serveQueue grants the waiting requests for which there is memory now; b.mu is held. A
// request that has to wait longer does not delay those after it.
func (b *byteBudget) serveQueue() {
	if len(b.queue) == 0 {
		return
	}
	rest := b.queue[:0]
	for _, w := range b.queue {
		g, granted, _ := b.take(w.i, w.bytes, w.phase)
		if !granted {
			rest = append(rest, w)
			continue
		}
		w.grant = g
		close(w.ready)
	}
	clear(b.queue[len(rest):])
	b.queue = rest
}

// leave removes a waiter from the queue, or gives its memory back if it has got it meanwhile.
func (b *byteBudget) leave(w *waiter) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if n := slices.Index(b.queue, w); n >= 0 {
		b.queue = slices.Delete(b.queue, n, n+1)
		return
	}
	b.giveBack(w.i, &w.grant)
}

// stuck returns the connections that must be closed because others need the memory that
// they hold: those whose peer has neither acknowledged nor sent a byte for stuckAfter. It
// returns the largest first, and no more than are needed for three quarters of the budget
// to be free. It searches once in stuckLook at most; b.mu is held.
//
// Memory of requests that wait for a device does not count: a read of a device cannot be
// interrupted, so its memory would not be given back.
func (b *byteBudget) stuck(now time.Time) []*inflight {
	if now.Sub(b.lastLook) < stuckLook {
		return nil
	}
	b.lastLook = now
	var found []*inflight
	free := b.size - b.used
	for i := range b.conns {
		switch {
		case i.ending:
			free += i.withPeer()
		case i.isStuck(now):
			found = append(found, i)
		}
	}
	slices.SortFunc(found, func(a, b *inflight) int { return cmp.Compare(b.withPeer(), a.withPeer()) })
	for n, i := range found {
		if free >= b.size/4*3 {
			return found[:n]
		}
		free += i.withPeer()
		i.ending = true
	}
	return found
}
