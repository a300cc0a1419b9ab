package vdi

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"xapi-nbd/xapi"
)

// Recovered is what one Recover came to.
type Recovered struct {
	Removed []string   // uuids of VBDs that are gone now; those that were gone already are not listed
	Left    []Leftover // still to be removed
}

// recoverTimeout bounds how long Recover waits: somebody may wait for its answer.
const recoverTimeout = 30 * time.Second

// Recover removes what earlier processes left behind, and what this one could not
// remove yet: the VBDs of the journal, the tagged ones of this host's control
// domain, and those of unanswered calls of VBD.create, less those in use now. It
// waits until it has made one attempt at each of them, side by side, but not for
// longer than half a minute. The error joins why something is left; that is tried
// again, until Close, in the background.
//
// It never touches a VBD that is neither in the journal nor tagged, nor one of
// another VM or host.
func (m *Manager) Recover(ctx context.Context) (Recovered, error) {
	if !m.locked.Load() {
		return Recovered{}, ErrNotLocked
	}
	ctx, cancel := context.WithTimeout(ctx, recoverTimeout)
	defer cancel()
	err := m.discover(ctx)
	attempts := m.wakeAll()
	var result Recovered
	failed := []error{err}
	for _, a := range attempts {
		if err == nil { // else there is nothing to wait for
			m.waitAttempt(ctx, a)
		}
		m.mu.Lock()
		switch {
		case a.l.removed:
			result.Removed = append(result.Removed, a.l.uuid)
		case slices.Contains(m.leftovers, a.l):
			result.Left = append(result.Left, a.l.status())
			failed = append(failed, a.l.problem())
		}
		m.mu.Unlock()
	}
	return result, errors.Join(failed...)
}

// attemptAt is an attempt at a leftover that is waited for.
type attemptAt struct {
	l *leftover
	n int // of the attempt
}

// wakeAll has all leftovers tried, and returns the attempts that begin from now on.
func (m *Manager) wakeAll() []attemptAt {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []attemptAt
	for _, l := range m.leftovers {
		all = append(all, attemptAt{l, l.begun + 1})
		l.poke()
	}
	return all
}

// waitAttempt waits until an attempt has ended, or the leftover is gone.
func (m *Manager) waitAttempt(ctx context.Context, a attemptAt) {
	for {
		m.mu.Lock()
		over, changed := a.l.ended >= a.n || !slices.Contains(m.leftovers, a.l), a.l.changed
		m.mu.Unlock()
		if over {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		case <-m.ctx.Done():
			return
		}
	}
}

// problem says why a leftover is left. m.mu is held.
func (l *leftover) problem() error {
	name := "VBD " + l.uuid
	if l.uuid == "" {
		name = "VBD.create for VDI " + l.vdi
	}
	switch {
	case l.err == nil:
		return fmt.Errorf("%s: no attempt has ended yet", name)
	case l.next.IsZero():
		return fmt.Errorf("%s: an attempt is under way; the last one: %w", name, l.err)
	}
	return fmt.Errorf("%s: %w", name, l.err)
}

// The pauses between two looks for what was left behind: when the last look went
// well, and, growing up to that, when it did not.
const (
	recoverEvery = 5 * time.Minute
	recoverAgain = time.Second
)

// KeepRecovering looks for what earlier processes left behind, at once and every
// few minutes until ctx ends. Each leftover is then worked on in the background,
// also after that, until Close.
func (m *Manager) KeepRecovering(ctx context.Context) {
	again := recoverAgain
	for {
		pause := recoverEvery
		if err := m.discover(ctx); err == nil || ctx.Err() != nil {
			again = recoverAgain
		} else {
			pause, again = again, min(2*again, recoverEvery)
			m.log.Error("cannot look for VBDs that were left behind", "err", err, "again_in", pause.String())
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
	}
}

// discover makes leftovers of everything that is to be removed: what the state
// folder lists, without asking xapi, and what xapi knows of. What is not certain
// to be in use by then is looked at again when it is tried.
func (m *Manager) discover(ctx context.Context) error {
	// The lists come before the look at what is in use: an attachment that enters
	// them in between is seen to be in use.
	uuids, err := m.journal.list()
	creates, err2 := m.journal.creates()
	if err := errors.Join(err, err2); err != nil {
		return err
	}
	h, err := readInventory(ctx, m.cfg.Inventory)
	if err == nil {
		err = m.holdHost(ctx, h)
	}
	if err != nil {
		return err
	}
	tagged, err := m.taggedFresh(ctx)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closing {
		return ErrClosed
	}
	now := time.Now()
	for _, v := range tagged {
		m.find(&removal{vbd: v.ref, uuid: v.uuid, nonce: v.nonce}, now)
	}
	for _, uuid := range slices.Backward(uuids) { // the oldest first
		m.find(&removal{uuid: uuid, suspect: true}, now)
	}
	for _, c := range slices.Backward(creates) {
		m.find(&removal{nonce: c.nonce, vdi: c.vdi, created: c.since}, now)
	}
	return err
}

// find begins to remove what an earlier process left, unless it is in use, worked
// on, or not ours. m.mu is held.
func (m *Manager) find(r *removal, now time.Time) {
	if m.inUse(r.uuid, r.nonce) || m.notOurs[r.uuid] {
		return
	}
	r.m, r.log, r.ask = m, m.log, true
	since := now
	if !r.created.IsZero() && r.created.Before(now) {
		since = r.created
	}
	m.adopt(newLeftover(r, since))
}

// taggedFresh is tagged with a local session of its own.
func (m *Manager) taggedFresh(ctx context.Context) ([]taggedVBD, error) {
	s, err := m.cfg.Client.Login(ctx, Originator)
	if err != nil {
		return nil, err
	}
	defer logout(ctx, s, m.log)
	return m.tagged(ctx, s)
}

// taggedVBD is a VBD of this host's control domain that this service made.
type taggedVBD struct {
	ref         xapi.VBDRef
	uuid, nonce string
}

// tagged lists the VBDs that this service made on this host, this process or an
// earlier one.
func (m *Manager) tagged(ctx context.Context, s *xapi.Session) ([]taggedVBD, error) {
	h, err := readInventory(ctx, m.cfg.Inventory)
	if err != nil {
		return nil, err
	}
	dom0, err := s.VMByUUID(ctx, h.controlDomain) // not from memory: a wrong ref would find nothing
	if err != nil {
		return nil, err
	}
	m.rememberControlDomain(controlDomain{h.controlDomain, dom0})
	records, err := s.VBDsOfVM(ctx, dom0)
	if err != nil {
		return nil, fmt.Errorf("VBDs of the control domain: %w", err)
	}
	var found []taggedVBD
	for ref, r := range records {
		if t, ok := readTag(r.OtherConfig); ok && t.installation == h.installation {
			found = append(found, taggedVBD{ref: ref, uuid: r.UUID, nonce: t.nonce})
		}
	}
	return found, nil
}

// isPending reports whether a VBD.create is still listed as unanswered.
func (m *Manager) isPending(nonce string) (bool, error) {
	creates, err := m.journal.creates()
	return slices.ContainsFunc(creates, func(c pendingCreate) bool { return c.nonce == nonce }), err
}
