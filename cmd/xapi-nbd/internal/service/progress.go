package service

import (
	"context"
	"sync"
	"time"

	"xapi-nbd/nbd"
)

// sample is the position of a connection's reads at a time.
type sample struct {
	at       time.Time
	position int64
}

// A sample is taken of each connection every sampleEvery, and keptSamples of them are
// kept: the time left comes from the rate of the last half minute.
const (
	sampleEvery = 5 * time.Second
	keptSamples = 6
)

// progress has recent positions of each connection's reads. Its methods may be called
// concurrently.
type progress struct {
	mu      sync.Mutex          // guards samples
	samples map[string][]sample // by the ID of the connection, the oldest first
}

// keep takes samples of the connections that conns returns, until ctx ends.
func (p *progress) keep(ctx context.Context, conns func() []nbd.ConnStatus) {
	tick := time.NewTicker(sampleEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			p.note(time.Now(), conns())
		case <-ctx.Done():
			return
		}
	}
}

// note takes a sample of each connection, and drops the samples of connections that are
// not in conns. If a position went back the client has started again, so the older samples
// of that connection are dropped.
func (p *progress) note(now time.Time, conns []nbd.ConnStatus) {
	p.mu.Lock()
	defer p.mu.Unlock()
	next := make(map[string][]sample, len(conns))
	for _, c := range conns {
		if !c.Serving {
			continue
		}
		all := p.samples[c.ID]
		switch {
		case len(all) > 0 && c.Position < all[len(all)-1].position:
			all = nil
		case len(all) == keptSamples:
			all = all[1:]
		}
		next[c.ID] = append(all, sample{now, c.Position})
	}
	p.samples = next
}

// left returns how long a connection will take to reach the end of its disk, at the rate of
// the last half minute. It reports false without such a rate: the connection has been
// served for less than sampleEvery, or its position has not moved.
func (p *progress) left(now time.Time, c nbd.ConnStatus) (time.Duration, bool) {
	if c.Position >= c.Size {
		return 0, true
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	all := p.samples[c.ID]
	if len(all) == 0 || c.Position < all[len(all)-1].position {
		return 0, false
	}
	took, moved := now.Sub(all[0].at), c.Position-all[0].position
	if took <= 0 || moved <= 0 {
		return 0, false
	}
	left := float64(c.Size-c.Position) / float64(moved) * took.Seconds()
	return time.Duration(min(left, maxLeft.Seconds()) * float64(time.Second)), true
}

// maxLeft bounds the result of left: a hundred years.
const maxLeft = 100 * 365 * 24 * time.Hour

// percentRead returns the share of the disk before the position, in percent, rounded down.
func percentRead(c nbd.ConnStatus) int {
	if c.Size == 0 {
		return 100
	}
	return int(float64(c.Position) / float64(c.Size) * 100)
}
