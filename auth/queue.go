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

// ErrTooManyRejections means that xapi was not asked about a session, because it has
// rejected many sessions of the same peer and too many others of such peers wait.
var ErrTooManyRejections = errors.New("too many rejected sessions from this address")

// The limits of questions about sessions. They keep strangers, who need nothing but
// a made-up session for each question, from keeping xapi and other clients busy.
const (
	// maxQuestions is how many are asked at one time, maxPerPeer how many of them for
	// one peer, and maxOfRejected how many for all peers with recent rejections.
	maxQuestions  = 16
	maxPerPeer    = 4
	maxOfRejected = 4
	// maxWaitingRejected is how many questions of peers with recent rejections wait,
	// and maxDelayed how many of one peer that has to pause. Each of them holds one of
	// the server's connections.
	maxWaitingRejected = 32
	maxDelayed         = 8
	// freeRejections are those of one peer that cost nothing. After each further one
	// the peer's next question is delayed: by firstPenalty, then by twice as much, up
	// to lastPenalty. A session that xapi knows may be among those that wait, so all
	// of maxDelayed must be asked about before clients give up.
	freeRejections = 8
	firstPenalty   = 250 * time.Millisecond
	lastPenalty    = 2 * time.Second
	// forgetPeer is how long after the last one rejections are forgotten, and maxPeers
	// for how many peers they are remembered.
	forgetPeer = time.Minute
	maxPeers   = 4096
)

// queue decides who may ask xapi about a session, and when: peers without recent
// rejections before all others. It is safe for concurrent use; the zero value is
// ready.
type queue struct {
	mu      sync.Mutex
	peers   map[string]*peer // those that ask, wait, or were rejected lately
	waiting []*turn          // in the order of their coming
	asking  []*turn          // those that were granted and have not ended
	timer   *time.Timer      // calls grant when the next delay is over; nil while there is none
}

// peer is what is known of one address.
type peer struct {
	asking     int
	waiting    int
	rejections int       // recent ones
	last       time.Time // when the last of them was
	until      time.Time // no question before, except about a known session
}

// turn is the permission to ask one question, or the wait for it.
type turn struct {
	q       *queue
	name    string // of the peer
	peer    *peer
	known   bool          // xapi has accepted this session before: no limit but maxQuestions holds
	decided chan struct{} // closed when granted or err is set
	granted bool
	err     error
}

// wait waits for permission to ask about a session of the peer. The caller ends the
// turn with end. Errors are ErrTooManyRejections, at once or later, or that of ctx.
func (q *queue) wait(ctx context.Context, name string, known bool) (*turn, error) {
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

// join makes a turn that waits, or is decided already.
func (q *queue) join(name string, known bool) *turn {
	q.mu.Lock()
	defer q.mu.Unlock()
	t := &turn{q: q, name: name, peer: q.peer(name), known: known, decided: make(chan struct{})}
	t.peer.waiting++
	q.waiting = append(q.waiting, t)
	if t.peer.rejections > 0 {
		q.enforce()
	}
	q.grant()
	return t
}

// outcome is what became of a turn.
type outcome int

const (
	unanswered outcome = iota // or not asked: nothing is known of the peer
	accepted
	rejected
)

// end gives the permission back and notes what became of the question.
func (t *turn) end(o outcome) {
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

// finish ends a granted turn; q.mu is held.
func (q *queue) finish(t *turn) {
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

// peer returns what is known of a peer; q.mu is held.
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

// forget drops a peer about which there is nothing to know; q.mu is held.
func (q *queue) forget(name string, p *peer) {
	if p.asking == 0 && p.waiting == 0 && p.rejections == 0 {
		delete(q.peers, name)
	}
}

// makeRoom drops the peers whose rejections are forgotten, or else the one with the
// oldest; q.mu is held.
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

// enforce refuses turns of peers with rejections if more of them wait than may; q.mu is
// held. A peer that has to pause is refused its last turns, and of all those that remain
// the ones of peers with the most rejections.
func (q *queue) enforce() {
	now := time.Now()
	var waiting []*turn
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
	// Of equals the last.
	slices.SortStableFunc(waiting, func(a, b *turn) int { return cmp.Compare(a.peer.rejections, b.peer.rejections) })
	for _, t := range waiting[maxWaitingRejected:] {
		q.refuse(t, ErrTooManyRejections)
	}
}

// refuse ends the wait for a turn; q.mu is held.
func (q *queue) refuse(t *turn, err error) {
	q.leave(t)
	t.err = err
	close(t.decided)
	q.forget(t.name, t.peer)
}

// leave takes a turn out of those that wait; q.mu is held.
func (q *queue) leave(t *turn) {
	i := slices.Index(q.waiting, t)
	q.waiting = slices.Delete(q.waiting, i, i+1)
	t.peer.waiting--
}

// grant lets those ask for whom there is room; q.mu is held.
func (q *queue) grant() {
	for len(q.asking) < maxQuestions {
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

// schedule has grant called again when the first delay is over; q.mu is held.
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

// isDelayed reports whether the turn may not be granted yet; q.mu is held.
func (t *turn) isDelayed(now time.Time) bool { return !t.known && t.peer.until.After(now) }

// next returns whose turn it is, nil if nobody may ask now; q.mu is held.
func (q *queue) next() (best *turn) {
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

// before reports whether t comes before u, which has waited longer.
func (t *turn) before(u *turn) bool {
	switch {
	case t.known != u.known:
		return t.known
	case t.peer.rejections != u.peer.rejections:
		return t.peer.rejections < u.peer.rejections
	}
	return t.peer.asking < u.peer.asking
}
