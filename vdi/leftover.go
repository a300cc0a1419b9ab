package vdi

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"xapi-nbd/xapi"
)

// Leftover is a VBD that has to be removed and belongs to no attachment, or a VBD.create
// that xapi may still execute. The manager tries to remove all leftovers concurrently, each
// at growing intervals; see [Manager.Leftovers].
type Leftover struct {
	// VBD is the uuid of the VBD. It is "" if there was no response to VBD.create, so
	// that xapi may still execute the call.
	VBD string
	// VDI is the uuid of the VDI; "" until xapi has named it.
	VDI string
	// Since is when the detach began, or when this process found the leftover of an
	// earlier process.
	Since time.Time
	// Attempts counts the attempts to remove it that have failed.
	Attempts int
	// LastError is the error of the last attempt, one line; "" before the end of the
	// first attempt.
	LastError string
	// NextAttempt is the time of the next attempt; zero during an attempt.
	NextAttempt time.Time
}

// leftover is a removal whose first attempt failed, or that an earlier process has left
// behind. One goroutine, work, makes attempts until one succeeds.
type leftover struct {
	*removal
	wake chan struct{}      // holds one token when an attempt is to begin at once
	stop context.CancelFunc // ends work

	// Guarded by m.mu.
	since    time.Time
	attempts int
	err      error // of the last attempt
	busy     bool  // xapi was working on the VBD at the end of the last attempt
	begun    int   // number of attempts that have begun
	ended    int   // number of attempts that have ended
	next     time.Time
	removed  bool          // this process has removed the VBD
	changed  chan struct{} // closed and replaced when an attempt has ended, or none will begin
}

func newLeftover(r *removal, since time.Time) *leftover {
	return &leftover{removal: r, since: since, wake: make(chan struct{}, 1), changed: make(chan struct{})}
}

// Pauses between the attempts to remove a leftover.
const (
	firstCreatePause = time.Second // after a VBD.create without a response
	// unreachablePause is the longest pause while xapi cannot be reached: the cause is
	// not the VBD.
	unreachablePause = 5 * time.Second
	longestPause     = 5 * time.Minute
	// attemptTimeout is longer than xapi waits for a device to be closed.
	attemptTimeout = 11 * time.Minute
)

// failed counts and logs a failed attempt. m.mu is held, or l is not shared yet.
func (l *leftover) failed(err error) {
	l.attempts++
	l.err, l.busy = err, l.isUnderWay(err)
	l.log.Warn("cannot remove a VBD that was left behind", "vbd", l.uuid, "err", err,
		"age", time.Since(l.since).Round(time.Second).String(), "attempts", l.attempts)
}

// adopt adds a leftover to the list and starts work for it, unless the list has the same
// VBD already. m.mu is held.
func (m *Manager) adopt(l *leftover) {
	for _, other := range m.leftovers {
		same := l.nonce != "" && l.nonce == other.nonce
		if l.uuid != "" && other.uuid != "" {
			same = l.uuid == other.uuid
		}
		if same {
			return
		}
	}
	m.leftovers = append(m.leftovers, l)
	var ctx context.Context
	ctx, l.stop = context.WithCancel(m.ctx)
	m.done.Go(func() { m.work(ctx, l) })
}

// work tries to remove a leftover until that succeeds or ctx ends.
func (m *Manager) work(ctx context.Context, l *leftover) {
	defer l.stop()
	var pause time.Duration
	if l.attempts > 0 { // the attachment has made one
		pause = l.pauseAfter(0, l.err)
		if !l.sleep(ctx, &pause) {
			return
		}
	}
	for {
		m.mu.Lock()
		l.begun++
		l.next = time.Time{}
		m.mu.Unlock()
		attempt, cancel := context.WithTimeout(ctx, attemptTimeout)
		err := l.attempt(attempt)
		cancel()
		if ctx.Err() != nil && err != nil {
			return // the next process finds it
		}
		pause = l.pauseAfter(pause, err)
		if m.endAttempt(l, err, pause) || !l.sleep(ctx, &pause) {
			return
		}
	}
}

// attempt makes one attempt to remove the VBD. It succeeds if the VBD does not exist any
// more, or if the VBD.create is not in the journal any more.
func (l *leftover) attempt(ctx context.Context) error {
	if !l.created.IsZero() {
		known, err := l.m.isPending(l.nonce)
		if err != nil || !known {
			return err
		}
	}
	return l.try(ctx)
}

// pauseAfter returns the pause after an attempt that failed with err. last is the pause
// before that attempt.
func (l *leftover) pauseAfter(last time.Duration, err error) time.Duration {
	first, longest := firstPause, longestPause
	if l.vbd == "" && !l.created.IsZero() {
		first = firstCreatePause
	}
	var lost *xapi.TransportError
	if l.phase == asking && errors.As(err, &lost) {
		longest = unreachablePause
	}
	return min(max(2*last, first), longest)
}

// sleep waits for the pause or for poke, which sets pause to 0. It returns false if ctx has
// ended.
func (l *leftover) sleep(ctx context.Context, pause *time.Duration) bool {
	timer := time.NewTimer(*pause)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-l.wake:
		*pause = 0
	case <-ctx.Done():
	}
	return ctx.Err() == nil
}

// poke makes work begin an attempt at once, or directly after the one in progress.
func (l *leftover) poke() {
	select {
	case l.wake <- struct{}{}:
	default: // there is a token already
	}
}

// endAttempt stores the result of an attempt, and reports whether it was the last one.
func (m *Manager) endAttempt(l *leftover, err error, pause time.Duration) (done bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	l.ended++
	l.signalChanged()
	switch {
	case err == nil:
		if l.vbd != "" {
			l.removed = true
			l.log.Info("removed a VBD that was left behind", "vbd", l.uuid)
		}
	case errors.Is(err, errNotOurs):
		l.log.Warn("the journal names a VBD that is not this host's; it is not touched", "vbd", l.uuid)
		m.notOurs[l.uuid] = true
	case errors.Is(err, errOtherProcess): // recovery looks again, until that process has ended
		l.log.Debug("a VBD belongs to another process of this service", "vbd", l.uuid)
	default:
		l.next = time.Now().Add(pause)
		l.failed(err)
		return false
	}
	m.leftovers = slices.DeleteFunc(m.leftovers, func(o *leftover) bool { return o == l })
	m.signalSlotFree()
	return true
}

// signalChanged wakes all who wait for the leftover. m.mu is held.
func (l *leftover) signalChanged() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// Wake starts an attempt to remove each leftover at once. Call it when xapi responds again
// after an outage.
func (m *Manager) Wake() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, l := range m.leftovers {
		l.poke()
	}
}

// Leftovers returns everything that this process still has to remove, oldest first.
func (m *Manager) Leftovers() []Leftover {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := make([]Leftover, 0, len(m.leftovers))
	for _, l := range m.leftovers {
		all = append(all, l.status())
	}
	slices.SortFunc(all, func(a, b Leftover) int {
		return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.VBD, b.VBD))
	})
	return all
}

// status returns the public form of l. m.mu is held.
func (l *leftover) status() Leftover {
	s := Leftover{VBD: l.uuid, VDI: l.vdi, Since: l.since, Attempts: l.attempts, NextAttempt: l.next}
	if l.err != nil {
		s.LastError = l.err.Error()
	}
	return s
}
