package nbd

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// byteBudget is what the requests of all connections may have in memory, in bytes.
// Taking blocks the reader of requests, which is the protocol's natural
// back-pressure: what is not read stays with the client.
//
// A connection may take as much as it leaves to all others: one alone gets half,
// each of two a third. So peers that do not take their replies never hold all
// of it, however many there are.
type byteBudget struct {
	max int64

	mu    sync.Mutex // guards what follows and taken and n of every inflight
	used  int64
	queue []*waiter // connections that wait, in the order of their coming
}

// waiter is a connection that waits; it reads no request meanwhile, so there is
// one for each at most.
type waiter struct {
	i     *inflight
	bytes int64
	ready chan struct{} // closed when it was given what it waits for
}

// fits reports whether a request may be served now; b.mu is held. One that is
// larger than all there is is served alone.
func (b *byteBudget) fits(i *inflight, bytes int64) bool {
	switch {
	case i.n >= i.maxRequests:
		return false
	case bytes == 0, b.used == 0:
		return true
	case b.used+bytes > b.max:
		return false
	}
	return i.taken == 0 || i.taken+bytes <= b.max-b.used-bytes
}

func (b *byteBudget) take(i *inflight, bytes int64) {
	i.n++
	i.taken += bytes
	b.used += bytes
}

// serveQueue gives those who wait what fits; b.mu is held. One that has nothing
// yet is not overtaken: what becomes free is kept for it.
func (b *byteBudget) serveQueue() {
	rest := b.queue[:0]
	for n, w := range b.queue {
		if b.fits(w.i, w.bytes) {
			b.take(w.i, w.bytes)
			close(w.ready)
			continue
		}
		rest = append(rest, w)
		if w.i.n == 0 {
			rest = append(rest, b.queue[n+1:]...)
			break
		}
	}
	clear(b.queue[len(rest):])
	b.queue = rest
}

// leave takes a waiter out of the queue, or gives back what it got meanwhile.
func (b *byteBudget) leave(w *waiter) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for n, other := range b.queue {
		if other == w {
			b.queue = append(b.queue[:n], b.queue[n+1:]...)
			b.serveQueue()
			return
		}
	}
	b.giveBack(w.i, w.bytes)
}

func (b *byteBudget) giveBack(i *inflight, bytes int64) {
	i.n--
	i.taken -= bytes
	b.used -= bytes
	if len(b.queue) > 0 {
		b.serveQueue()
	}
}

// inflight counts what one connection has under way: requests against its own
// limit, bytes against the server's budget.
type inflight struct {
	budget      *byteBudget
	maxRequests int

	n     int   // under way; guarded by budget.mu
	taken int64 // of the budget; guarded by budget.mu

	wg      sync.WaitGroup
	lastEnd atomic.Int64 // when the last one ended, in nanoseconds of the epoch
}

func newInflight(s *Server) *inflight {
	return &inflight{budget: s.budget, maxRequests: s.MaxInflight}
}

// tryBegin begins a request with so many bytes if that is possible at once.
// Every success needs an end with the same number, which may be called by
// another goroutine.
func (i *inflight) tryBegin(bytes int64) bool {
	b := i.budget
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.queue) > 0 || !b.fits(i, bytes) {
		return false
	}
	b.take(i, bytes)
	i.wg.Add(1)
	return true
}

// begin is tryBegin that waits, until ctx ends.
func (i *inflight) begin(ctx context.Context, bytes int64) error {
	b := i.budget
	w := &waiter{i: i, bytes: bytes, ready: make(chan struct{})}
	b.mu.Lock()
	b.queue = append(b.queue, w)
	b.serveQueue()
	b.mu.Unlock()
	select {
	case <-w.ready:
		i.wg.Add(1)
		return nil
	case <-ctx.Done():
		b.leave(w)
		return context.Cause(ctx)
	}
}

func (i *inflight) end(bytes int64) {
	i.lastEnd.Store(time.Now().UnixNano())
	i.budget.mu.Lock()
	i.budget.giveBack(i, bytes)
	i.budget.mu.Unlock()
	i.wg.Done()
}

// idleSince is since when nothing has been under way, for a reader of requests
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

// drain waits until nothing is under way. Nothing may begin meanwhile.
func (i *inflight) drain() { i.wg.Wait() }
