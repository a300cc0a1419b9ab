package service

import (
	"context"
	"sync"
	"sync/atomic"

	"golang.org/x/time/rate"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
)

// A step is the number of bytes of one wait: as many as the rate allows in a twentieth of a
// second, within minStep and maxStep. Readers take turns after each step, so that a long
// read does not hold up the others for long.
const (
	stepsPerSecond = 20
	minStep        = 4 << 10
	maxStep        = 1 << 20
)

// throttle limits a rate of bytes.
type throttle struct {
	on      atomic.Bool
	limiter *rate.Limiter
}

func newThrottle(perSecond config.ByteSize) *throttle {
	t := &throttle{limiter: rate.NewLimiter(rate.Inf, maxStep)}
	t.set(perSecond)
	return t
}

// set changes the rate; 0 is none.
func (t *throttle) set(perSecond config.ByteSize) {
	if perSecond == 0 {
		t.on.Store(false)
		t.limiter.SetLimit(rate.Inf)
		return
	}
	t.limiter.SetLimit(rate.Limit(perSecond))
	t.limiter.SetBurst(int(min(max(perSecond/stepsPerSecond, minStep), maxStep)))
	t.on.Store(true)
}

// step returns how many of n bytes one call of wait may be for.
func (t *throttle) step(n int64) int64 {
	if !t.on.Load() {
		return n
	}
	return min(n, int64(t.limiter.Burst()))
}

// wait waits until the rate allows step bytes, or ctx ends. If a reload has lowered the
// rate so that the step is too long now, it returns at once.
func (t *throttle) wait(ctx context.Context, step int64) {
	if t.on.Load() {
		_ = t.limiter.WaitN(ctx, int(step))
	}
}

// rates are the limits of rate_limit and rate_limit_vdi.
type rates struct {
	all *throttle

	mu     sync.Mutex // guards the fields below
	perVDI config.ByteSize
	vdis   map[string]*vdiRate // by uuid, of VDIs with connections
}

// vdiRate is shared by the connections to one VDI.
type vdiRate struct {
	*throttle
	users int // guarded by rates.mu
}

func newRates(all, perVDI config.ByteSize) *rates {
	return &rates{all: newThrottle(all), perVDI: perVDI, vdis: make(map[string]*vdiRate)}
}

// set changes the limits, also of reads that are waiting.
func (r *rates) set(all, perVDI config.ByteSize) {
	r.all.set(all)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.perVDI = perVDI
	for _, v := range r.vdis {
		v.set(perVDI)
	}
}

// join returns the pace of a new connection to a VDI, and a function that ends its use.
func (r *rates) join(vdi string) (*pace, func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	v, ok := r.vdis[vdi]
	if !ok {
		v = &vdiRate{throttle: newThrottle(r.perVDI)}
		r.vdis[vdi] = v
	}
	v.users++
	return &pace{all: r.all, vdi: v.throttle, waiting: make(chan struct{}, 1)}, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if v.users--; v.users == 0 {
			delete(r.vdis, vdi)
		}
	}
}

// pace applies the limits to one connection. It implements nbd.Pacer.
type pace struct {
	all, vdi *throttle
	waiting  chan struct{} // holds one element while a read of this connection waits
}

// Paces implements nbd.Pacer.
func (p *pace) Paces() bool { return p.all.on.Load() || p.vdi.on.Load() }

// Pace implements nbd.Pacer. Only one read of a connection waits for the limiters at a
// time, so that a client with many requests in flight gets no larger share.
func (p *pace) Pace(ctx context.Context, n int64) {
	select {
	case p.waiting <- struct{}{}:
		defer func() { <-p.waiting }()
	case <-ctx.Done():
		return
	}
	for n > 0 && ctx.Err() == nil {
		step := p.all.step(p.vdi.step(n))
		p.vdi.wait(ctx, step)
		p.all.wait(ctx, step)
		n -= step
	}
}
