package nbd

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// inflight counts the requests in flight of one connection, and the memory that they use of
// its reserve and of the server's budget.
type inflight struct {
	budget      *byteBudget
	device      *deviceShare
	maxRequests int
	meter       transfers
	cut         func() // closes the connection, see byteBudget.stuck

	// Guarded by budget.mu.
	n        int   // requests in flight
	reserved int64 // bytes of the reserve in use
	taken    int64 // bytes of the budget in use
	pending  int64 // the part of taken that waits for the device
	blocked  int   // reads in pieces that wait for the device while no other reply can be sent
	rate     rate
	measured time.Time // when rate was updated
	seen     int64     // meter.Progress when it changed last
	seenAt   time.Time // when that was seen
	ending   bool      // cut has been called or will be

	wg      sync.WaitGroup
	lastEnd atomic.Int64 // when the last request ended, in nanoseconds since 1970
}

// transfers is the part of sock.Meter that inflight uses.
type transfers interface {
	Total() int64
	Progress() (bytes int64, known bool)
}

// newInflight registers a connection with the budget. drain removes it.
func newInflight(b *byteBudget, maxRequests int, device string, meter transfers, cut func()) *inflight {
	i := &inflight{budget: b, maxRequests: maxRequests, meter: meter, cut: cut}
	i.measure(time.Now())
	b.add(i, device)
	return i
}

// tryBegin begins a request that needs memory for so many bytes, and that is in phase p
// first, if this is possible now. The caller must call end for each grant; another
// goroutine may do so.
func (i *inflight) tryBegin(bytes int64, p phase) (g grant, granted bool) {
	b := i.budget
	b.mu.Lock()
	if i.reserved+bytes > reserveSize {
		i.measure(time.Now())
	}
	g, granted, short := b.take(i, bytes, p)
	if granted {
		i.wg.Add(1)
	}
	var stuck []*inflight
	if short {
		stuck = b.stuck(time.Now())
	}
	b.mu.Unlock()
	for _, other := range stuck {
		other.cut()
	}
	return g, granted
}

// begin is tryBegin, but waits until it succeeds or ctx is done.
func (i *inflight) begin(ctx context.Context, bytes int64, p phase) (grant, error) {
	b := i.budget
	w := &waiter{i: i, bytes: bytes, phase: p, ready: make(chan struct{})}
	b.mu.Lock()
	b.queue = append(b.queue, w)
	b.serveQueue()
	b.mu.Unlock()
	select {
	case <-w.ready:
		i.wg.Add(1)
		return w.grant, nil
	case <-ctx.Done():
		b.leave(w)
		return grant{}, context.Cause(ctx)
	}
}

// move changes the phase of a request.
func (i *inflight) move(g *grant, p phase) {
	if g.memory != inBudget || g.phase == p {
		return
	}
	i.budget.mu.Lock()
	defer i.budget.mu.Unlock()
	i.budget.move(i, g, p)
}

// blocks records that a read in pieces begins (or no longer continues) to wait for the
// device while no other reply can be sent. The peer is not stuck then.
func (i *inflight) blocks(does bool) {
	i.budget.mu.Lock()
	defer i.budget.mu.Unlock()
	if does {
		i.blocked++
	} else {
		i.blocked--
		i.seenAt = time.Time{}
	}
}

// end ends a request and gives its memory back.
func (i *inflight) end(g grant) {
	now := time.Now()
	i.lastEnd.Store(now.UnixNano())
	i.budget.mu.Lock()
	if g.memory != inReserve {
		i.measure(now)
	}
	i.budget.giveBack(i, &g)
	i.budget.mu.Unlock()
	i.wg.Done()
}

// measureEvery is the shortest time between two measurements of the rate, each of which
// needs a system call.
const measureEvery = 10 * time.Millisecond

// measure updates the rate; budget.mu is held.
func (i *inflight) measure(now time.Time) {
	if now.Sub(i.measured) >= measureEvery {
		i.measured = now
		i.rate.note(i.meter.Total(), now)
	}
}

// window returns how many bytes of the second half of the budget the connection may hold:
// as many as its peer receives or sends in two seconds. budget.mu is held.
func (i *inflight) window() int64 { return 2 * i.rate.perSecond() }

// withPeer returns how many bytes of the budget wait for the peer; budget.mu is held.
func (i *inflight) withPeer() int64 { return i.taken - i.pending }

// isStuck reports whether the connection holds memory of the budget and its peer has made
// no progress for stuckAfter, since the first call that looked; budget.mu is held.
func (i *inflight) isStuck(now time.Time) bool {
	if i.withPeer() == 0 || i.blocked > 0 {
		return false
	}
	n, known := i.meter.Progress()
	if !known || i.seenAt.IsZero() || n != i.seen {
		i.seen, i.seenAt = n, now
	}
	return now.Sub(i.seenAt) >= stuckAfter
}

// idleSince returns since when no request has been in flight, but at the earliest begin,
// when the reader of requests began to wait. It returns the present if there is one.
func (i *inflight) idleSince(begin time.Time) time.Time {
	i.budget.mu.Lock()
	n := i.n
	i.budget.mu.Unlock()
	if n != 0 {
		return time.Now()
	}
	if end := time.Unix(0, i.lastEnd.Load()); end.After(begin) {
		return end
	}
	return begin
}

// now returns the number of requests in flight and the memory that they use.
func (i *inflight) now() (requests int, bytes int64) {
	i.budget.mu.Lock()
	defer i.budget.mu.Unlock()
	return i.n, i.taken + i.reserved
}

// drain waits until no request is in flight. No request may begin meanwhile or later.
func (i *inflight) drain() {
	i.wg.Wait()
	i.budget.remove(i)
}

// rate measures how fast a total has grown lately.
type rate struct {
	begin  time.Time // of the present interval
	at     int64     // the total at begin
	now    int64     // the total
	before int64     // bytes per second of the last interval
}

// rateInterval is the shortest interval.
const rateInterval = time.Second

// note records the total at a time.
func (r *rate) note(total int64, now time.Time) {
	r.now = total
	if r.begin.IsZero() {
		r.begin, r.at = now, total
	}
	if took := now.Sub(r.begin); took >= rateInterval {
		r.before = int64(float64(total-r.at) / took.Seconds())
		r.begin, r.at = now, total
	}
}

// perSecond returns the rate of the last interval, or the growth in the present one if that
// is more.
func (r *rate) perSecond() int64 { return max(r.before, r.now-r.at) }
