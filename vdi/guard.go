package vdi

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// While a VDI is attached for writing, xapi is asked every guardEvery whether it is still
// exclusively ours. A write begins at most maxUnguarded after the beginning of the last check
// that succeeded; then writes wait for the next one. If the checks fail for maxPaused the
// attachment ends. So a restart of xapi, which takes about a minute, ends no transfer.
const (
	maxUnguarded = 10 * time.Second
	maxPaused    = 2 * time.Minute
)

var guardEvery = time.Second // constant, except in tests

// guard makes writes wait while it is not known whether the VDI may be written. Its methods
// may be called concurrently. Make one with newGuard.
//
// It decides by the age of the last check when a write is about to begin, not by a flag that
// somebody has to set: after the process or the host was stopped for a while, a write may be
// the first that runs.
type guard struct {
	now func() time.Duration // bootTime, except in tests

	mu      sync.Mutex    // guards the fields below
	checked time.Duration // by now, when the last check began that succeeded
	renewed chan struct{} // closed and replaced when a check has succeeded
}

// newGuard returns a guard that makes writes wait until confirm was called.
func newGuard(now func() time.Duration) *guard {
	return &guard{now: now, checked: now() - maxUnguarded, renewed: make(chan struct{})}
}

// confirm stores that a check has succeeded, which began at the given time.
func (g *guard) confirm(began time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.checked = began
	close(g.renewed)
	g.renewed = make(chan struct{})
}

// age returns the time since the beginning of the last check that succeeded, and a channel that
// is closed when the next one has succeeded.
func (g *guard) age() (age time.Duration, renewed <-chan struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.now() - g.checked, g.renewed
}

// wait returns nil when a write may begin, or the cause of the end of ctx.
func (g *guard) wait(ctx context.Context) error {
	for ctx.Err() == nil {
		age, renewed := g.age()
		if age < maxUnguarded {
			return nil
		}
		select {
		case <-renewed:
		case <-ctx.Done():
		}
	}
	return context.Cause(ctx)
}

// keepGuarding calls check, see checkExclusive, every guardEvery until the lifetime ends,
// and ends it if the VDI must not be written. An earlier check has been confirmed.
func (a *attachment) keepGuarding(check func(context.Context) error) {
	ctx := a.lifetime
	tick := time.NewTicker(guardEvery)
	defer tick.Stop()
	var failing time.Time // the beginning of the first check that has failed since the last success
	warned := false       // since the last success
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		began, start := a.guard.now(), time.Now()
		// Its own time limit, whatever the age of the last check is: the process may have
		// been stopped meanwhile. An xapi that hangs is asked again.
		call, cancel := context.WithTimeout(ctx, maxUnguarded)
		err := check(call)
		cancel()
		age, _ := a.guard.age()
		var broken *ExclusiveError
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			a.guard.confirm(began)
			if warned {
				a.log.Info("xapi answers again, writes go on", "vbd", a.vbdUUID, "after", age.Round(time.Second).String())
			}
			failing, warned = time.Time{}, false
			continue
		case errors.As(err, &broken):
			a.forbid(broken)
			return
		case errors.Is(err, ErrLost):
			a.lose(err)
			return
		case failing.IsZero():
			failing = start
		}
		switch {
		case time.Since(failing) >= maxPaused:
			a.forbid(&ExclusiveError{ruleUnknown, fmt.Sprintf("xapi has not told for %v: %v", maxPaused, err)})
			return
		case age >= maxUnguarded && !warned:
			warned = true
			a.log.Warn("xapi does not tell whether the VDI is still ours alone, writes wait", "vbd", a.vbdUUID, "limit", maxPaused.String(), "err", err)
		}
	}
}

// forbid ends an attachment whose VDI must not be written any more: no further write begins,
// and the connections end.
func (a *attachment) forbid(broken *ExclusiveError) {
	if a.endUse(broken) {
		a.log.Error("writing ended: the VDI is not ours alone any more", "vbd", a.vbdUUID, "rule", broken.Rule, "seen", broken.Seen)
	}
}
