package nbd

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
)

// inflight counts what one connection has under way: requests against its own
// limit, payload bytes against a share of the server's and against the
// server's whole. Taking blocks the reader of requests, which is the protocol's
// natural back-pressure: what is not read stays with the client.
type inflight struct {
	server   *semaphore.Weighted // bytes of all connections
	own      *semaphore.Weighted // bytes of this one
	requests *semaphore.Weighted
	ownMax   int64
	max      int64
	wg       sync.WaitGroup
	n        atomic.Int64 // under way
	lastEnd  atomic.Int64 // when the last one ended, in nanoseconds of the epoch
}

func newInflight(s *Server) *inflight {
	own := s.MaxInflightBytesPerConn
	return &inflight{
		server: s.bytes, max: s.MaxInflightBytes,
		own: semaphore.NewWeighted(own), ownMax: own,
		requests: semaphore.NewWeighted(int64(s.MaxInflight)),
	}
}

// begin waits until a request with n bytes of payload may be served. A request
// above a whole limit is served alone. Every success needs an end with the same
// n, which may be called by another goroutine.
func (i *inflight) begin(ctx context.Context, n int64) error {
	if err := i.requests.Acquire(ctx, 1); err != nil {
		return err
	}
	if err := i.own.Acquire(ctx, min(n, i.ownMax)); err != nil {
		i.requests.Release(1)
		return err
	}
	if err := i.server.Acquire(ctx, min(n, i.max)); err != nil {
		i.own.Release(min(n, i.ownMax))
		i.requests.Release(1)
		return err
	}
	i.wg.Add(1)
	i.n.Add(1)
	return nil
}

func (i *inflight) end(n int64) {
	i.server.Release(min(n, i.max))
	i.own.Release(min(n, i.ownMax))
	i.requests.Release(1)
	i.lastEnd.Store(time.Now().UnixNano())
	i.n.Add(-1)
	i.wg.Done()
}

// idleSince is since when nothing has been under way, for a reader of requests
// that has waited since begin: now, if something is.
func (i *inflight) idleSince(begin time.Time) time.Time {
	if i.n.Load() != 0 {
		return time.Now()
	}
	if end := time.Unix(0, i.lastEnd.Load()); end.After(begin) {
		return end
	}
	return begin
}

// drain waits until nothing is under way. Nothing may begin meanwhile.
func (i *inflight) drain() { i.wg.Wait() }
