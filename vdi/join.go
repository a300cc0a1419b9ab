package vdi

import (
	"context"
	"errors"
	"time"

	"xapi-nbd/xapi"
)

// request is a call of Attach or AttachWritable.
type request struct {
	vdi    string          // uuid
	bases  []string        // uuids of the VDIs to compare it to
	writer xapi.SessionRef // whose session writes it; "" for reading
}

// join adds a user to the VDI's attachment. If there is none it makes one with session s,
// and made is true. The caller calls release.
func (m *Manager) join(ctx context.Context, s *xapi.Session, r request) (a *attachment, made bool, err error) {
	arrived := time.Now()
	for first := true; ; first = false {
		a, next, err := m.tryJoin(s, r, first)
		switch {
		case err != nil:
			return nil, false, err
		case next.wait == nil:
			return a, next.made, nil
		}
		if err := next.await(ctx, arrived); err != nil {
			if next.forSlot && errors.Is(err, ErrStillAttaching) {
				err = &LimitError{Max: m.limits.Load().MaxVBDs}
			}
			return nil, false, err
		}
	}
}

// outcome is the result of tryJoin. If wait is nil the caller has become a user.
type outcome struct {
	made    bool            // the caller is the first user of a new attachment
	wait    <-chan struct{} // closed when tryJoin is to be called again
	forSlot bool            // all slots are in use, and one of them will be free
	since   time.Time       // when the VDI's previous attachment began to end, if wait is for that; else zero
}

// A caller waits for the previous attachment of its VDI until maxDetachWait after the
// beginning of the detach: most take a second or two, and one that takes longer is stuck.
// It waits for at least minDetachWait, in which the removal of the old VBD is tried again.
const (
	maxDetachWait = 20 * time.Second
	minDetachWait = time.Second
)

// await waits until tryJoin is to be called again. It returns an error if ctx ends before.
func (o outcome) await(ctx context.Context, arrived time.Time) error {
	if !o.since.IsZero() {
		until := o.since.Add(maxDetachWait)
		if least := arrived.Add(minDetachWait); until.Before(least) {
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

// tryJoin joins or makes an attachment, or returns an outcome to wait for. first is true in
// the first call for a client.
func (m *Manager) tryJoin(s *xapi.Session, r request, first bool) (*attachment, outcome, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.closing:
		return nil, outcome{}, ErrClosed
	case !m.locked.Load():
		return nil, outcome{}, ErrNotLocked
	}
	if a, ok := m.attachments[r.vdi]; ok {
		if a.stage < lost {
			if err := a.admits(r); err != nil {
				return nil, outcome{}, err
			}
		}
		if a.stage == lingering && a.lacks(r.bases) {
			a.moveTo(detaching)
			a.poke()
		}
		if a.stage >= lost {
			return nil, outcome{wait: a.gone, since: a.endingSince}, nil
		}
		a.users++
		for _, base := range r.bases {
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
	if next := m.mustWaitFor(r.vdi, first); next.wait != nil {
		return nil, next, nil
	}
	if limit := m.limits.Load().MaxVBDs; len(m.attachments) >= limit {
		if !m.slotWillFree() {
			return nil, outcome{}, &LimitError{Max: limit}
		}
		// Wait for any slot, not for that one: its detach may take long.
		return nil, outcome{wait: m.slotFree, forSlot: true}, nil
	}
	a := newAttachment(m, r)
	m.attachments[r.vdi] = a
	m.done.Go(func() { a.run(s) })
	return a, outcome{made: true}, nil
}

// admits returns an *ExclusiveError unless a client with this request may share the
// attachment: those who read share it, and one session's connections that write.
func (a *attachment) admits(r request) error {
	switch {
	case a.writer == r.writer:
		return nil
	case a.writer == "":
		return &ExclusiveError{ruleRead, "this service has it attached for reading"}
	case r.writer == "":
		return &ExclusiveError{ruleWritten, "a client of this service writes it"}
	}
	return &ExclusiveError{ruleWritten, "a client of this service with another session writes it"}
}

// maxLeftPerVDI is how many leftover VBDs of a VDI may exist when another one is made.
// Without a limit, a client that retries would use up the VBDs of the control domain.
const maxLeftPerVDI = 2

// mustWaitFor returns the leftover for which a new attachment of a VDI has to wait: xapi
// does not plug a VDI while it unplugs it. If xapi has refused to unplug the old VBD, a new
// one may be plugged, up to maxLeftPerVDI. In the first call for a client it also starts an
// attempt to remove each leftover of the VDI. m.mu is held.
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

// slotWillFree reports whether an attachment is ending, so that a slot will be free. If
// none is, it ends one that lingers. m.mu is held.
func (m *Manager) slotWillFree() bool {
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
