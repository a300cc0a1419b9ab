package nbd

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// inflight counts what one connection has in service: requests against its own
// limit, bytes against its reserve and the server's budget.
type inflight struct {
	budget      *byteBudget
	device      *deviceShare
	maxRequests int
	meter       transfers
	cut         func() // ends the connection, see byteBudget.stuck

	// Guarded by budget.mu.
	n        int   // requests in service
	reserved int64 // bytes of the reserve that are in use
	taken    int64 // bytes of the budget
	pending  int64 // of taken, what waits for the device
	blocked  int   // reads in pieces that keep other replies waiting for the device
	rate     rate
	measured time.Time // when rate was taken down
	seen     int64     // meter.Progress, when it was last seen to change
	seenAt   time.Time // when that was
	ending   bool      // cut has been called or is about to be

	wg      sync.WaitGroup
	lastEnd atomic.Int64 // when the last one ended, in nanoseconds of the epoch
}

// transfers is the part of sock.Meter that inflight uses.
type transfers interface {
	Total() int64
	Progress() (bytes int64, known bool)
}

// newInflight begins to count for a connection. drain ends it.
func newInflight(b *byteBudget, maxRequests int, device string, meter transfers, cut func()) *inflight {
	i := &inflight{budget: b, maxRequests: maxRequests, meter: meter, cut: cut}
	i.measure(time.Now())
	b.add(i, device)
	return i
}

// tryBegin begins a request that moves so many bytes, and waits in phase p first,
// if that is possible at once. Every grant needs an end, which may be called by
// another goroutine.
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

// begin is tryBegin that waits, until ctx ends.
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

// move says on which side a request waits from now on.
func (i *inflight) move(g *grant, p phase) {
	if g.memory != inBudget || g.phase == p {
		return
	}
	i.budget.mu.Lock()
	defer i.budget.mu.Unlock()
	i.budget.move(i, g, p)
}

// blocks says whether a request in pieces keeps other replies waiting while it
// waits for the device, which is not the peer's fault.
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

// end ends a request and gives back its memory.
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

// measureEvery is the shortest time between two measurements of the rate, each of
// which is a system call.
const measureEvery = 10 * time.Millisecond

// measure takes the rate down; budget.mu is held.
func (i *inflight) measure(now time.Time) {
	if now.Sub(i.measured) >= measureEvery {
		i.measured = now
		i.rate.note(i.meter.Total(), now)
	}
}

// window is how many bytes of the budget the connection may hold: what its peer
// takes or sends in two seconds. budget.mu is held.
func (i *inflight) window() int64 { return 2 * i.rate.perSecond() }

// withPeer is how many bytes of the budget wait for the peer; budget.mu is held.
func (i *inflight) withPeer() int64 { return i.taken - i.pending }

// isStuck reports whether the connection holds memory of the budget and its peer
// has made no progress for stuckAfter, as far as anybody has looked; budget.mu is held.
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

// idleSince is since when nothing has been in service, for a reader of requests
// that has waited since begin: now, if something is.
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

// now is what is in service.
func (i *inflight) now() (requests int, bytes int64) {
	i.budget.mu.Lock()
	defer i.budget.mu.Unlock()
	return i.n, i.taken + i.reserved
}

// drain waits until nothing is in service. Nothing may begin meanwhile or later.
func (i *inflight) drain() {
	i.wg.Wait()
	i.budget.remove(i)
}

// rate tells how fast a total has grown lately.
type rate struct {
	begin  time.Time // of the interval that is measured
	at     int64     // total at begin
	now    int64     // total
	before int64     // bytes per second of the interval before
}

// rateInterval is the least length of an interval.
const rateInterval = time.Second

// note takes down the total at some time.
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

// perSecond is the growth within the last interval or within this one so far.
func (r *rate) perSecond() int64 { return max(r.before, r.now-r.at) }
