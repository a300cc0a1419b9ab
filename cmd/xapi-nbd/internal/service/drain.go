package service

import (
	"context"
	"errors"
	"sync"
	"time"
)

// drainState holds whether the service is draining: refusing new clients until the
// connections that it serves have ended, and then ending. Draining can be canceled until
// the end is final. The methods may be called concurrently; newDrainState makes one.
type drainState struct {
	mu      sync.Mutex    // guards the fields below
	on      bool          // the service is draining
	final   bool          // the service ends, and draining cannot be canceled
	started chan struct{} // closed while on is true; a new channel after cancel
}

func newDrainState() *drainState { return &drainState{started: make(chan struct{})} }

// isOn reports whether new clients are refused.
func (d *drainState) isOn() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.on
}

// start starts draining. It reports false if the service is draining already.
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

// errEnding is the error of cancel when the end is final.
var errEnding = errors.New("the service is ending")

// cancel stops draining. It reports false if the service is not draining, and fails with
// errEnding if the end of the service is final.
func (d *drainState) cancel() (changed bool, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.final:
		return false, errEnding
	case !d.on:
		return false, nil
	}
	d.on, d.started = false, make(chan struct{})
	return true, nil
}

// finish makes the end of the service final if it is draining and empty reports that no
// connection is left. It reports whether it did. empty is called with the lock held, so
// that no client is admitted between its answer and the change.
func (d *drainState) finish(empty func() bool) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.on || !empty() {
		return false
	}
	d.final = true
	return true
}

// ending makes the end of the service final, for a reason other than draining.
func (d *drainState) ending() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.final = true
}

// whenStarted returns a channel that is closed when the service starts draining.
func (d *drainState) whenStarted() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.started
}

// errDrained is the cause of the end after draining.
var errDrained = errors.New("drained: the last connection has ended")

// drainPoll is the interval at which a draining service counts its connections.
const drainPoll = 100 * time.Millisecond

// wait waits until finish succeeds and returns true, or until ctx ends and returns false.
func (d *drainState) wait(ctx context.Context, empty func() bool) bool {
	tick := time.NewTicker(drainPoll)
	defer tick.Stop()
	for {
		select {
		case <-d.whenStarted():
		case <-ctx.Done():
			return false
		}
		if d.finish(empty) {
			return true
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return false
		}
	}
}

// errJustReplaced is the error of Drain in a process that an upgrade replaces meanwhile.
var errJustReplaced = errors.New("an upgrade has just replaced this process: ask again, which reaches the new one")

// Drain implements [control.Service]. It waits for the end of an upgrade: the process that
// is in charge then is the one to drain.
func (s *Service) Drain(ctx context.Context) (serving int, err error) {
	if err := s.waitInCharge(ctx); err != nil {
		return 0, err
	}
	changing := s.beginChange(ctx)
	if changing {
		defer s.endChange()
	}
	switch {
	case s.replaced.Load():
		return 0, errJustReplaced
	case !changing:
		return 0, errEnding
	}
	if s.draining.start() {
		s.log.Info("draining: new clients are refused", "connections", s.server.Serving())
	}
	return s.server.Serving() + s.replacedOnes().serving(s.lifetime), nil
}

// Undrain implements [control.Service]. It fails with errEnding.
func (s *Service) Undrain() (changed bool, err error) {
	changed, err = s.draining.cancel()
	if changed {
		s.log.Info("not draining any more: new clients are served", "connections", s.server.Serving())
	}
	return changed, err
}

// waitDrained cancels with errDrained when the service has drained. It returns when
// ctx ends, too.
func (s *Service) waitDrained(ctx context.Context, cancel context.CancelCauseFunc) {
	empty := func() bool { return s.server.Serving() == 0 && len(s.replacedOnes().generations()) == 0 }
	if s.draining.wait(ctx, empty) {
		cancel(errDrained)
	}
}
