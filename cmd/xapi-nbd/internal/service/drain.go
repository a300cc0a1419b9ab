package service

import (
	"context"
	"errors"
	"sync"
	"time"
)

// drainState says whether the service drains: it refuses new clients, and ends when
// the connections that it serves have ended. Draining can be taken back until the
// end has been decided. Its methods may be called concurrently; see newDrainState.
type drainState struct {
	mu      sync.Mutex    // guards what follows
	on      bool          // the service drains
	decided bool          // the service ends, whatever on says
	started chan struct{} // closed while on; made anew when draining is taken back
}

func newDrainState() *drainState { return &drainState{started: make(chan struct{})} }

// isOn reports whether new clients are refused.
func (d *drainState) isOn() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.on
}

// start begins to drain. It reports whether that is a change.
func (d *drainState) start() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.on {
		return false
	}
	d.on = true
	close(d.started)
	return true
}

// errEnding is why draining cannot be taken back any more.
var errEnding = errors.New("the service is ending")

// takeBack ends the draining. It reports whether that is a change, and fails with
// errEnding when the end of the service has been decided.
func (d *drainState) takeBack() (changed bool, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.decided:
		return false, errEnding
	case !d.on:
		return false, nil
	}
	d.on, d.started = false, make(chan struct{})
	return true, nil
}

// decide makes the end of the service final if it drains and nobody is left to be
// served, which empty tells. It reports whether it did. The lock is held meanwhile,
// so no client can be admitted between the look and the decision.
func (d *drainState) decide(empty func() bool) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.on || !empty() {
		return false
	}
	d.decided = true
	return true
}

// ending makes the end of the service final, for a reason other than draining.
func (d *drainState) ending() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.decided = true
}

// begun returns a channel that is closed as soon as the service drains.
func (d *drainState) begun() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.started
}

// errDrained is the reason of the end after draining.
var errDrained = errors.New("drained: the last connection has ended")

// drainPoll is the time between looks for connections while the service drains.
const drainPoll = 100 * time.Millisecond

// wait waits until the service drains and empty reports that no connection is left,
// decides the end then and returns true. It returns false when ctx ends first.
func (d *drainState) wait(ctx context.Context, empty func() bool) bool {
	tick := time.NewTicker(drainPoll)
	defer tick.Stop()
	for {
		select {
		case <-d.begun():
		case <-ctx.Done():
			return false
		}
		if d.decide(empty) {
			return true
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return false
		}
	}
}

// Drain implements [Service].
func (s *Service) Drain() (serving int) {
	if s.draining.start() {
		s.log.Info("draining: new clients are refused", "connections", s.server.Serving())
	}
	return s.server.Serving()
}

// Undrain implements [Service]. It fails with errEnding.
func (s *Service) Undrain() (changed bool, err error) {
	changed, err = s.draining.takeBack()
	if changed {
		s.log.Info("not draining any more: new clients are served", "connections", s.server.Serving())
	}
	return changed, err
}

// waitDrained cancels with errDrained when the service has drained. It returns when
// ctx ends, too.
func (s *Service) waitDrained(ctx context.Context, cancel context.CancelCauseFunc) {
	if s.draining.wait(ctx, func() bool { return s.server.Serving() == 0 }) {
		cancel(errDrained)
	}
}
