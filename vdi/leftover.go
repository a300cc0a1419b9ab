package vdi

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"xapi-nbd/xapi"
)

// Leftover is a VBD that is to be removed and belongs to no attachment, or a
// VBD.create of which nobody knows whether xapi has executed it. The service tries
// to remove each of them, side by side, at growing intervals; see [Manager.Leftovers].
type Leftover struct {
	// VBD is the uuid of the VBD. It is "" while it is not known: then nothing was
	// heard of a VBD.create, and xapi may still execute it.
	VBD string
	// VDI is the uuid of the VDI, "" until xapi was asked for it.
	VDI string
	// Since is when its detach was begun, or, of what an earlier process has left,
	// when this process found it.
	Since time.Time
	// Attempts counts the attempts to remove it that have failed.
	Attempts int
	// LastError is why the last attempt failed, one line for people; "" before the
	// first one has ended.
	LastError string
	// NextAttempt is when it is tried again; zero while an attempt is under way.
	NextAttempt time.Time
}

// leftover is a removal that was not done at the first attempt, or that an earlier
// process has left. One goroutine, work, tries it until it succeeds.
type leftover struct {
	*removal
	wake chan struct{}      // holds one token when it is to be tried at once
	stop context.CancelFunc // ends work

	// Guarded by m.mu.
	since    time.Time
	attempts int
	err      error // of the last attempt
	busy     bool  // xapi was at work on the VBD at the end of the last attempt
	begun    int   // attempts
	ended    int   // attempts
	next     time.Time
	removed  bool          // the VBD is gone, and it was us
	changed  chan struct{} // closed, and made anew, when an attempt has ended
}

func newLeftover(r *removal, since time.Time) *leftover {
	return &leftover{removal: r, since: since, wake: make(chan struct{}, 1), changed: make(chan struct{})}
}

// Pauses between the attempts at a leftover.
const (
	firstCreatePause = time.Second // at a VBD.create that was not answered
	// unreachablePause is the longest while xapi cannot be reached: whatever is
	// wrong has nothing to do with the VBD.
	unreachablePause = 5 * time.Second
	longestPause     = 5 * time.Minute
	// attemptTimeout is longer than xapi waits for a device to be let go.
	attemptTimeout = 11 * time.Minute
)

// failed notes an attempt that failed. m.mu is held, or l is not shared yet.
func (l *leftover) failed(err error) {
	l.attempts++
	l.err, l.busy = err, l.isUnderWay(err)
	l.log.Warn("cannot remove a VBD that was left behind", "vbd", l.uuid, "err", err,
		"age", time.Since(l.since).Round(time.Second).String(), "attempts", l.attempts)
}

// adopt makes a leftover known and begins to work on it, unless it is known
// already. m.mu is held.
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
	if l.attempts > 0 { // by the attachment
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
			return // it is known to the next process
		}
		pause = l.pauseAfter(pause, err)
		if m.endAttempt(l, err, pause) || !l.sleep(ctx, &pause) {
			return
		}
	}
}

// attempt is one attempt at a removal. What somebody else has done meanwhile is
// success.
func (l *leftover) attempt(ctx context.Context) error {
	if !l.created.IsZero() {
		known, err := l.m.isPending(l.nonce)
		if err != nil || !known {
			return err
		}
	}
	return l.try(ctx)
}

// pauseAfter is the pause after an attempt that followed a pause and failed.
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

// sleep waits for pause, and reports whether ctx goes on. It sets pause to 0 if it
// was woken.
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

// poke makes work try at once, and again if it is trying already.
func (l *leftover) poke() {
	select {
	case l.wake <- struct{}{}:
	default: // it is going to
	}
}

// endAttempt notes how an attempt went, and reports whether it was the last one.
func (m *Manager) endAttempt(l *leftover, err error, pause time.Duration) (done bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	l.ended++
	close(l.changed)
	l.changed = make(chan struct{})
	switch {
	case err == nil:
		if l.vbd != "" {
			l.removed = true
			l.log.Info("removed a VBD that was left behind", "vbd", l.uuid)
		}
	case errors.Is(err, errNotOurs):
		l.log.Warn("the journal names a VBD that is not this host's; it is not touched", "vbd", l.uuid)
		m.notOurs[l.uuid] = true
	default:
		l.next = time.Now().Add(pause)
		l.failed(err)
		return false
	}
	m.leftovers = slices.DeleteFunc(m.leftovers, func(o *leftover) bool { return o == l })
	m.makeRoom()
	return true
}

// Wake has all leftovers tried at once: whatever kept them may have passed. It is
// to be called when xapi answers again that did not.
func (m *Manager) Wake() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, l := range m.leftovers {
		l.poke()
	}
}

// Leftovers tells of everything that this process is to remove, the oldest first.
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

// status tells of one. m.mu is held.
func (l *leftover) status() Leftover {
	s := Leftover{VBD: l.uuid, VDI: l.vdi, Since: l.since, Attempts: l.attempts, NextAttempt: l.next}
	if l.err != nil {
		s.LastError = l.err.Error()
	}
	return s
}
