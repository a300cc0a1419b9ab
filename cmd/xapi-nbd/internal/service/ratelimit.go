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

// throttle lets bytes through at a rate.
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

// step is how many of n bytes may be asked for at once.
func (t *throttle) step(n int64) int64 {
	if !t.on.Load() {
		return n
	}
	return min(n, int64(t.limiter.Burst()))
}

// wait returns when a step may go, or ctx has ended. One that has become too long
// meanwhile, because of a reload, goes at once.
func (t *throttle) wait(ctx context.Context, step int64) {
	if t.on.Load() {
		_ = t.limiter.WaitN(ctx, int(step))
	}
}

// rates are the limits of rate_limit and rate_limit_vdi.
type rates struct {
	all *throttle

	mu     sync.Mutex // guards what follows
	perVDI config.ByteSize
	vdis   map[string]*vdiRate // by uuid, of those that are read
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

// pace holds one connection to the limits. It implements nbd.Pacer.
type pace struct {
	all, vdi *throttle
	waiting  chan struct{} // holds one element while a read of this connection waits
}

// Paces implements nbd.Pacer.
func (p *pace) Paces() bool { return p.all.on.Load() || p.vdi.on.Load() }

// Pace implements nbd.Pacer. One read of a connection waits at a time: a client
// with many requests must not stand in the queue many times.
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
