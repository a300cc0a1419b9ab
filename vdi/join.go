package vdi

import (
	"context"
	"errors"
	"time"

	"xapi-nbd/xapi"
)

// join makes the caller a user of the VDI's attachment, which it makes if there
// is none; mine says so. The caller gives it back with release.
func (m *Manager) join(ctx context.Context, s *xapi.Session, vdiUUID string, bases []string) (a *attachment, mine bool, err error) {
	arrived := time.Now()
	for first := true; ; first = false {
		a, next, err := m.tryJoin(s, vdiUUID, bases, first)
		switch {
		case err != nil:
			return nil, false, err
		case next.wait == nil:
			return a, next.made, nil
		}
		if err := next.await(ctx, arrived); err != nil {
			if next.forRoom && errors.Is(err, ErrStillAttaching) {
				err = &LimitError{Max: m.limits.Load().MaxVBDs}
			}
			return nil, false, err
		}
	}
}

// outcome is what one try to join led to: without wait the caller is a user.
type outcome struct {
	made    bool            // the caller is the first user of a new attachment
	wait    <-chan struct{} // closed when another try makes sense
	forRoom bool            // all places are taken, but some other VDI's is ending
	since   time.Time       // when the VDI's old attachment, which is waited for, began to end; else zero
}

// detachPatience is how long after its beginning the end of a VDI's attachment is
// waited for. Most take a second or two; one that takes longer is stuck.
// Everybody waits for leastPatience, in which the old VBD is tried once more.
const (
	detachPatience = 20 * time.Second
	leastPatience  = time.Second
)

// await waits until another try makes sense, or returns why there is none.
func (o outcome) await(ctx context.Context, arrived time.Time) error {
	if !o.since.IsZero() {
		until := o.since.Add(detachPatience)
		if least := arrived.Add(leastPatience); until.Before(least) {
			until = least
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadlineCause(ctx, until, &DetachingError{o.since})
		defer cancel()
	}
	select {
	case <-o.wait:
		return nil
	case <-ctx.Done():
	}
	err := context.Cause(ctx)
	if !o.since.IsZero() && errors.Is(err, ErrStillAttaching) {
		return &DetachingError{o.since}
	}
	return err
}

func (m *Manager) tryJoin(s *xapi.Session, vdiUUID string, bases []string, first bool) (*attachment, outcome, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.closing:
		return nil, outcome{}, ErrClosed
	case !m.locked.Load():
		return nil, outcome{}, ErrNotLocked
	}
	if a, ok := m.attachments[vdiUUID]; ok {
		if a.stage == lingering && a.lacks(bases) {
			a.moveTo(detaching)
			a.poke()
		}
		if a.stage >= lost {
			return nil, outcome{wait: a.gone, since: a.endingSince}, nil
		}
		a.users++
		for _, base := range bases {
			if a.lacks([]string{base}) {
				a.logUnknown(base, errAttachedBefore)
			}
		}
		if a.stage == lingering {
			a.moveTo(attached)
			a.poke()
		}
		return a, outcome{}, nil
	}
	if next := m.mustWaitFor(vdiUUID, first); next.wait != nil {
		return nil, next, nil
	}
	if limit := m.limits.Load().MaxVBDs; len(m.attachments) >= limit {
		if !m.someEnds() {
			return nil, outcome{}, &LimitError{Max: limit}
		}
		// Any place will do: the one that is ending may take long.
		return nil, outcome{wait: m.room, forRoom: true}, nil
	}
	a := newAttachment(m, vdiUUID, bases)
	m.attachments[vdiUUID] = a
	m.done.Go(func() { a.run(s) })
	return a, outcome{made: true}, nil
}

// maxLeftPerVDI is how many VBDs of a VDI may be left to be removed while another
// one is made: else somebody who tries again and again would use up all of the
// control domain's.
const maxLeftPerVDI = 2

// mustWaitFor returns what a new attachment of a VDI has to wait for: xapi does
// not plug a VDI while it unplugs it. Where xapi has refused to unplug the old VBD
// a new one may be plugged, within limits. At the first look the old VBDs are tried
// at once, as their time may have come. m.mu is held.
func (m *Manager) mustWaitFor(vdiUUID string, first bool) outcome {
	left := 0
	var oldest *leftover
	for _, l := range m.leftovers {
		if l.vdi != vdiUUID || l.uuid == "" {
			continue
		}
		if first && !l.next.IsZero() {
			l.poke()
		}
		if l.busy || l.next.IsZero() {
			return outcome{wait: l.changed, since: l.since}
		}
		left++
		if oldest == nil || l.since.Before(oldest.since) {
			oldest = l
		}
	}
	if left >= maxLeftPerVDI {
		return outcome{wait: oldest.changed, since: oldest.since}
	}
	return outcome{}
}

// someEnds reports whether there will be room: some attachment is going already,
// or only lingers, and then goes. m.mu is held.
func (m *Manager) someEnds() bool {
	var idle *attachment
	for _, a := range m.attachments {
		switch {
		case a.stage >= lost:
			return true
		case a.stage == lingering:
			idle = a
		}
	}
	if idle == nil {
		return false
	}
	idle.moveTo(detaching)
	idle.poke()
	return true
}
