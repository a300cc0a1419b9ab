package auth

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"xapi-nbd/xapi"
)

// ErrTooManyRejections means that a session was not checked: xapi has rejected many
// sessions of the same peer, and too many checks of such peers are waiting.
var ErrTooManyRejections = errors.New("too many rejected sessions from this address")

// The limits of checks, which are calls to xapi about a session. Anybody can send made-up
// sessions; the limits keep those from delaying xapi and other clients.
const (
	// maxChecks bounds the concurrent checks, maxPerPeer those of one peer, and
	// maxOfRejected those of all peers with recent rejections.
	maxChecks     = 16
	maxPerPeer    = 4
	maxOfRejected = 4
	// maxWaitingRejected bounds the waiting checks of peers with recent rejections, and
	// maxDelayed those of one delayed peer. Each of them holds one of the server's
	// connections.
	maxWaitingRejected = 32
	maxDelayed         = 8
	// freeRejections is the number of rejections of one peer without a delay. Each
	// further one delays the peer's next check: by firstPenalty, then by twice as much, up
	// to lastPenalty. A valid session may be among the waiting ones, so all maxDelayed
	// checks must be made before clients give up.
	freeRejections = 8
	firstPenalty   = 250 * time.Millisecond
	lastPenalty    = 2 * time.Second
	// forgetPeer is the time after the last rejection at which those of a peer are
	// forgotten. maxPeers bounds the peers with remembered rejections.
	forgetPeer = time.Minute
	maxPeers   = 4096
)

// queue orders and limits checks: peers without recent rejections come first. It is safe
// for concurrent use; its zero value is ready.
type queue struct {
	mu      sync.Mutex
	peers   map[string]*peer // those with tickets or recent rejections
	waiting []*ticket        // oldest first
	asking  []*ticket        // granted and not ended
	timer   *time.Timer      // calls grant at the end of the next delay; nil without one
}

// peer is the record of one address.
type peer struct {
	asking     int
	waiting    int
	rejections int       // recent ones
	last       time.Time // time of the last one
	until      time.Time // no check before, except of a known session
}

// ticket is the permission for one check, or the wait for it.
type ticket struct {
	q       *queue
	name    string // of the peer
	peer    *peer
	known   bool          // xapi has accepted this session before: only maxChecks applies
	decided chan struct{} // closed when granted or err is set
	granted bool
	err     error
}

// wait waits for permission to check a session of the peer. The caller ends the ticket
// with end. Errors are ErrTooManyRejections, at once or later, or that of ctx.
func (q *queue) wait(ctx context.Context, name string, known bool) (*ticket, error) {
	t := q.join(name, known)
	select {
	case <-t.decided:
	case <-ctx.Done():
		q.mu.Lock()
		defer q.mu.Unlock()
		if t.granted {
			q.finish(t)
		} else if t.err == nil {
			q.refuse(t, nil)
		}
		return nil, &xapi.TransportError{Method: "session.get_record", Err: context.Cause(ctx)}
	}
	if t.err != nil {
		return nil, t.err
	}
	return t, nil
}

// join makes a ticket, which waits unless it is decided at once.
func (q *queue) join(name string, known bool) *ticket {
	q.mu.Lock()
	defer q.mu.Unlock()
	t := &ticket{q: q, name: name, peer: q.peer(name), known: known, decided: make(chan struct{})}
	t.peer.waiting++
	q.waiting = append(q.waiting, t)
	if t.peer.rejections > 0 {
		q.enforce()
	}
	q.grant()
	return t
}

// outcome is the result of a check.
type outcome int

const (
	unanswered outcome = iota // or not asked: says nothing about the peer
	accepted
	rejected
)

// end returns the permission and records the outcome.
func (t *ticket) end(o outcome) {
	q := t.q
	q.mu.Lock()
	defer q.mu.Unlock()
	switch o {
	case accepted:
		t.peer.rejections, t.peer.until = 0, time.Time{}
	case rejected:
		t.peer.reject(time.Now())
	}
	q.finish(t)
}

// finish removes a granted ticket; q.mu is held.
func (q *queue) finish(t *ticket) {
	i := slices.Index(q.asking, t)
	q.asking = slices.Delete(q.asking, i, i+1)
	t.peer.asking--
	q.forget(t.name, t.peer)
	q.enforce()
	q.grant()
}

// reject counts a rejection.
func (p *peer) reject(now time.Time) {
	p.rejections++
	p.last = now
	if n := p.rejections - freeRejections; n > 0 {
		p.until = now.Add(min(firstPenalty<<min(n-1, 16), lastPenalty))
	}
}

// peer returns the record of a peer and makes one if there is none; q.mu is held.
func (q *queue) peer(name string) *peer {
	p := q.peers[name]
	if p == nil {
		if q.peers == nil {
			q.peers = make(map[string]*peer)
		}
		if len(q.peers) >= maxPeers {
			q.makeRoom()
		}
		p = new(peer)
		q.peers[name] = p
	}
	if p.rejections > 0 && time.Since(p.last) >= forgetPeer {
		p.rejections, p.until = 0, time.Time{}
	}
	return p
}

// forget drops the record of a peer without tickets and rejections; q.mu is held.
func (q *queue) forget(name string, p *peer) {
	if p.asking == 0 && p.waiting == 0 && p.rejections == 0 {
		delete(q.peers, name)
	}
}

// makeRoom drops the peers whose rejections have expired, or else the one whose last
// rejection is the oldest; q.mu is held.
func (q *queue) makeRoom() {
	var oldest *peer
	oldestName := ""
	for name, p := range q.peers {
		switch {
		case p.asking > 0 || p.waiting > 0:
		case time.Since(p.last) >= forgetPeer:
			delete(q.peers, name)
		case oldest == nil || p.last.Before(oldest.last):
			oldest, oldestName = p, name
		}
	}
	if oldest != nil && len(q.peers) >= maxPeers {
		delete(q.peers, oldestName)
	}
}

// enforce refuses tickets of peers with rejections beyond the limits; q.mu is held. Of one
// delayed peer it refuses the newest tickets, and of the rest those of the peers with the
// most rejections.
func (q *queue) enforce() {
	now := time.Now()
	var waiting []*ticket
	delayed := make(map[*peer]int)
	for _, t := range slices.Clone(q.waiting) {
		if t.known || t.peer.rejections == 0 {
			continue
		}
		if t.peer.until.After(now) {
			if delayed[t.peer]++; delayed[t.peer] > maxDelayed {
				q.refuse(t, ErrTooManyRejections)
				continue
			}
		}
		waiting = append(waiting, t)
	}
	if len(waiting) <= maxWaitingRejected {
		return
	}
	// Among equals the newest.
	slices.SortStableFunc(waiting, func(a, b *ticket) int { return cmp.Compare(a.peer.rejections, b.peer.rejections) })
	for _, t := range waiting[maxWaitingRejected:] {
		q.refuse(t, ErrTooManyRejections)
	}
}

// refuse ends the wait for a ticket with an error; q.mu is held.
func (q *queue) refuse(t *ticket, err error) {
	q.leave(t)
	t.err = err
	close(t.decided)
	q.forget(t.name, t.peer)
}

// leave removes a ticket from the waiting ones; q.mu is held.
func (q *queue) leave(t *ticket) {
	i := slices.Index(q.waiting, t)
	q.waiting = slices.Delete(q.waiting, i, i+1)
	t.peer.waiting--
}

// grant grants waiting tickets as far as the limits allow; q.mu is held.
func (q *queue) grant() {
	for len(q.asking) < maxChecks {
		t := q.next()
		if t == nil {
			break
		}
		q.leave(t)
		q.asking = append(q.asking, t)
		t.peer.asking++
		t.granted = true
		close(t.decided)
	}
	q.schedule()
}

// schedule arranges the next call of grant for the end of the first delay; q.mu is held.
func (q *queue) schedule() {
	if q.timer != nil {
		q.timer.Stop()
		q.timer = nil
	}
	var first time.Time
	now := time.Now()
	for _, t := range q.waiting {
		if t.isDelayed(now) && (first.IsZero() || t.peer.until.Before(first)) {
			first = t.peer.until
		}
	}
	if !first.IsZero() {
		q.timer = time.AfterFunc(first.Sub(now), func() {
			q.mu.Lock()
			defer q.mu.Unlock()
			q.grant()
		})
	}
}

// isDelayed reports whether the delay of the ticket's peer is not over; q.mu is held.
func (t *ticket) isDelayed(now time.Time) bool { return !t.known && t.peer.until.After(now) }

// next returns the ticket to be granted next, nil if there is none now; q.mu is held.
func (q *queue) next() (best *ticket) {
	ofRejected := 0
	for _, t := range q.asking {
		if t.peer.rejections > 0 {
			ofRejected++
		}
	}
	now := time.Now()
	for _, t := range q.waiting {
		if !t.known && (t.peer.asking >= maxPerPeer || t.peer.rejections > 0 && ofRejected >= maxOfRejected) || t.isDelayed(now) {
			continue
		}
		if best == nil || t.before(best) {
			best = t
		}
	}
	return best
}

// before reports whether t is granted before u, which has waited longer.
func (t *ticket) before(u *ticket) bool {
	switch {
	case t.known != u.known:
		return t.known
	case t.peer.rejections != u.peer.rejections:
		return t.peer.rejections < u.peer.rejections
	}
	return t.peer.asking < u.peer.asking
}
