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
	// ErrNoPurpose means that no network of the pool is meant for NBD.
	ErrNoPurpose = errors.New("no network has an NBD purpose")
	// ErrConflictingPurpose means that some networks are meant for NBD with TLS and some for
	// NBD without, which xapi prevents except through a race or database surgery.
	ErrConflictingPurpose = errors.New("networks have contradictory NBD purposes")
)

// fetchTimeout bounds a fetch, which nobody's context does: its callers come and
// go. Together with the time for attaching a disk it stays below the minute that
// Xen Orchestra waits.
const fetchTimeout = 10 * time.Second

// NetworkPolicy knows what the pool's networks say about NBD. It is safe for
// concurrent use.
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

// NewNetworkPolicy returns a policy that asks with local's session and keeps each
// answer for ttl, so that a flood of connections does not become a flood of
// questions. With ttl 0 only concurrent ones share an answer.
func NewNetworkPolicy(local *xapi.Local, ttl time.Duration) *NetworkPolicy {
	fetch := func(ctx context.Context) (xapi.NetworkPurpose, error) { return fetchPurpose(ctx, local) }
	return &NetworkPolicy{fetch: fetch, ttl: ttl}
}

// Purpose returns PurposeNBD or PurposeInsecureNBD, the union over ALL networks
// of the pool: one nbd network anywhere means TLS everywhere. Otherwise the error
// is ErrNoPurpose, ErrConflictingPurpose, that of xapi or the transport, or that
// of ctx. The end of ctx ends the caller's wait, not the question that others may
// be waiting for.
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

// refresh asks xapi and caches the answer. It runs in singleflight's goroutine,
// one at a time, and ends by its own time limit.
func (p *NetworkPolicy) refresh() (any, error) {
	// Another flight may have landed between the caller's look and this one.
	if v, ok := p.fresh(); ok {
		return v, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), fetchTimeout)
	defer cancel()
	asked := time.Now() // the answer may be as old as the question
	purpose, err := p.fetch(ctx)
	if err != nil && !errors.Is(err, ErrNoPurpose) && !errors.Is(err, ErrConflictingPurpose) {
		return nil, err // not cached: xapi may answer the next caller
	}
	v := verdict{purpose: purpose, err: err, expires: asked.Add(p.ttl)}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cached = v
	return v, nil
}

// fetchPurpose asks with the local session: the client's is not known yet when
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
