package vdi

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// While a VDI is attached for writing, xapi is asked every guardEvery whether it is still
// exclusively ours. If xapi does not tell, writes go on for maxUnguarded, then wait until it
// does, and after maxPaused the attachment ends. So a restart of xapi, which takes about a
// minute, ends no transfer, and a write begins at most maxUnguarded after a check.
const (
	maxUnguarded = 10 * time.Second
	maxPaused    = 2 * time.Minute // from the last check, as maxUnguarded
)

var guardEvery = time.Second // constant, except in tests

// guard holds writes back while it is not known whether the VDI may be written. The zero
// value lets them through. Its methods may be called concurrently.
type guard struct {
	mu     sync.Mutex
	paused chan struct{} // closed when writes may go on; nil while they may
}

func (g *guard) pause() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.paused == nil {
		g.paused = make(chan struct{})
	}
}

// resume reports whether writes were waiting, or would have.
func (g *guard) resume() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.paused == nil {
		return false
	}
	close(g.paused)
	g.paused = nil
	return true
}

// wait returns nil when a write may begin, or the cause of the end of ctx.
func (g *guard) wait(ctx context.Context) error {
	for ctx.Err() == nil {
		g.mu.Lock()
		paused := g.paused
		g.mu.Unlock()
		if paused == nil {
			return nil
		}
		select {
		case <-paused:
		case <-ctx.Done():
		}
	}
	return context.Cause(ctx)
}

// keepGuarding calls check, see checkExclusive, every guardEvery until the lifetime ends,
// and ends it if the VDI must not be written. checked is when the last check began that succeeded.
func (a *attachment) keepGuarding(checked time.Time, check func(context.Context) error) {
	ctx := a.lifetime
	tick := time.NewTicker(guardEvery)
	defer tick.Stop()
	limit := maxUnguarded // the age of the last check at which something is done
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		began := time.Now()
		deadline := checked.Add(limit)
		if later := began.Add(maxUnguarded); later.Before(deadline) { // an xapi that hangs is asked again
			deadline = later
		}
		call, cancel := context.WithDeadline(ctx, deadline)
		err := check(call)
		cancel()
		var broken *ExclusiveError
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			if a.guard.resume() {
				a.log.Info("xapi answers again, writes go on", "vbd", a.vbdUUID, "after", time.Since(checked).Round(time.Second).String())
			}
			checked, limit = began, maxUnguarded
		case errors.As(err, &broken):
			a.forbid(broken)
			return
		case errors.Is(err, ErrLost):
			a.lose(err)
			return
		case time.Since(checked) >= maxPaused:
			a.forbid(&ExclusiveError{ruleUnknown, fmt.Sprintf("xapi has not told for %v: %v", maxPaused, err)})
			return
		case time.Since(checked) >= limit:
			a.guard.pause()
			limit = maxPaused
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
