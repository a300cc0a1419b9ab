package auth

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"xapi-nbd/xapi"
)

var (
	// ErrNoPurpose means that no network of the pool has a purpose of NBD.
	ErrNoPurpose = errors.New("no network has an NBD purpose")
	// ErrConflictingPurpose means that some networks are meant for NBD with TLS and some for
	// NBD without, which xapi prevents except through a race or database surgery.
	ErrConflictingPurpose = errors.New("networks have contradictory NBD purposes")
)

// fetchTimeout bounds a fetch, which runs without a caller's context because several
// callers share it. Together with the timeout for attaching a disk it stays below the
// minute that Xen Orchestra waits.
const fetchTimeout = 10 * time.Second

// NetworkPolicy asks xapi for the purposes of the pool's networks and caches the answer.
// It is safe for concurrent use.
type NetworkPolicy struct {
	fetch  func(context.Context) (xapi.NetworkPurpose, error) // fetchPurpose, except in tests
	ttl    time.Duration
	flight singleflight.Group

	mu     sync.Mutex // guards cached
	cached verdict
}

// verdict is an answer about the networks; the zero value has expired.
type verdict struct {
	purpose xapi.NetworkPurpose
	err     error // nil, ErrNoPurpose or ErrConflictingPurpose
	expires time.Time
}

// NewNetworkPolicy returns a policy that calls xapi with local's session and caches each
// answer for ttl, so that many connections make few calls. With ttl 0 only concurrent
// callers share an answer.
func NewNetworkPolicy(local *xapi.Local, ttl time.Duration) *NetworkPolicy {
	fetch := func(ctx context.Context) (xapi.NetworkPurpose, error) { return fetchPurpose(ctx, local) }
	return &NetworkPolicy{fetch: fetch, ttl: ttl}
}

// Purpose returns PurposeNBD or PurposeInsecureNBD, the union over ALL networks of the
// pool: one network with purpose nbd means TLS on all. Otherwise the error is
// ErrNoPurpose, ErrConflictingPurpose, that of xapi or of the transport, or that of ctx.
// The end of ctx ends the wait of this caller; the call goes on for the others.
func (p *NetworkPolicy) Purpose(ctx context.Context) (xapi.NetworkPurpose, error) {
	if v, ok := p.fresh(); ok {
		return v.purpose, v.err
	}
	select {
	case r := <-p.flight.DoChan("", p.refresh):
		if r.Err != nil {
			return "", r.Err
		}
		v := r.Val.(verdict)
		return v.purpose, v.err
	case <-ctx.Done():
		return "", fmt.Errorf("waiting for the network purposes: %w", context.Cause(ctx))
	}
}

func (p *NetworkPolicy) fresh() (verdict, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cached, time.Now().Before(p.cached.expires)
}

// refresh calls xapi and caches the answer. It runs in singleflight's goroutine, one at a
// time, and ends after fetchTimeout at the latest.
func (p *NetworkPolicy) refresh() (any, error) {
	// Another call may have ended since the caller looked at the cache.
	if v, ok := p.fresh(); ok {
		return v, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), fetchTimeout)
	defer cancel()
	asked := time.Now() // the answer may be as old as the call
	purpose, err := p.fetch(ctx)
	if err != nil && !errors.Is(err, ErrNoPurpose) && !errors.Is(err, ErrConflictingPurpose) {
		return nil, err // not cached: the next call may succeed
	}
	v := verdict{purpose: purpose, err: err, expires: asked.Add(p.ttl)}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cached = v
	return v, nil
}

// fetchPurpose calls xapi with the local session: the client has not sent its own yet when
// the transport is decided.
func fetchPurpose(ctx context.Context, local *xapi.Local) (xapi.NetworkPurpose, error) {
	var networks map[xapi.NetworkRef]xapi.NetworkRecord
	err := local.Do(ctx, func(s *xapi.Session) (err error) {
		networks, err = s.NetworkRecords(ctx)
		return err
	})
	if err != nil {
		return "", err
	}
	return union(networks)
}

func union(networks map[xapi.NetworkRef]xapi.NetworkRecord) (xapi.NetworkPurpose, error) {
	has := make(map[xapi.NetworkPurpose]bool)
	for _, network := range networks {
		for _, purpose := range network.Purpose {
			has[purpose] = true
		}
	}
	switch secure, insecure := has[xapi.PurposeNBD], has[xapi.PurposeInsecureNBD]; {
	case secure && insecure:
		return "", ErrConflictingPurpose
	case secure:
		return xapi.PurposeNBD, nil
	case insecure:
		return xapi.PurposeInsecureNBD, nil
	default:
		return "", ErrNoPurpose
	}
}
