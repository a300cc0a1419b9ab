package vdi

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"xapi-nbd/xapi"
)

// Recovered is the result of [Manager.Recover].
type Recovered struct {
	Removed []string   // uuids of the VBDs that were removed
	Left    []Leftover // still to be removed
}

// recoverTimeout bounds Recover: its caller may be waiting in a terminal.
const recoverTimeout = 30 * time.Second

// Recover removes the VBDs that earlier processes left behind, and those that this process
// could not remove yet: the VBDs of the journal, the tagged VBDs of this host's control
// domain, and those of calls of VBD.create without a response. It leaves out those in use
// and those of other living processes, see [Manager.OtherGenerations].
// Recover returns after one attempt for each of them, made concurrently, or after 30 s. The
// error joins the reasons of those that are left. They are tried again in the background,
// until Close.
//
// Recover never removes a VBD that is neither in the journal nor tagged, nor one of another
// VM or host.
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
		if err == nil { // else no attempt can succeed
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

// attemptAt is the nth attempt to remove a leftover.
type attemptAt struct {
	l *leftover
	n int
}

// wakeAll starts an attempt for each leftover, and returns these attempts.
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

// waitAttempt waits until an attempt has ended, the leftover is removed, or ctx ends.
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

// problem returns the reason why a leftover is not removed yet. m.mu is held.
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

// KeepRecovering searches every recoverEvery. After a search that failed, the first pause is
// recoverAgain; it doubles with each failure.
const (
	recoverEvery = 5 * time.Minute
	recoverAgain = time.Second
)

// KeepRecovering searches for VBDs that earlier processes left behind, at once and every 5
// minutes until ctx ends. They are removed in the background, until Close.
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

// discover adopts as leftovers the entries of the state folder, without a question to xapi,
// and the tagged VBDs that xapi lists, except those in use. Each attempt to remove one
// checks its VBD again.
func (m *Manager) discover(ctx context.Context) error {
	// The lists are read before inUse is called: an attachment that is added to them in
	// between is then found to be in use.
	uuids, err := m.journal.list()
	creates, err2 := m.ownCreates()
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
		if v.otherProcess {
			uuids = slices.DeleteFunc(uuids, func(uuid string) bool { return uuid == v.uuid })
			continue
		}
		m.adoptFound(&removal{vbd: v.ref, uuid: v.uuid, nonce: v.nonce}, now)
	}
	for _, uuid := range slices.Backward(uuids) { // the oldest first
		m.adoptFound(&removal{uuid: uuid, suspect: true}, now)
	}
	for _, c := range slices.Backward(creates) {
		m.adoptFound(&removal{nonce: c.nonce, vdi: c.vdi, created: c.since}, now)
	}
	return err
}

// adoptFound adopts a leftover that discover has found, unless it is in use or belongs to
// another VM or host. m.mu is held.
func (m *Manager) adoptFound(r *removal, now time.Time) {
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

// taggedFresh calls tagged with a new local session.
func (m *Manager) taggedFresh(ctx context.Context) ([]taggedVBD, error) {
	s, err := m.cfg.Client.Login(ctx, Originator)
	if err != nil {
		return nil, err
	}
	defer logout(ctx, s, m.log)
	return m.tagged(ctx, s)
}

// taggedVBD is a VBD of this host's control domain that this service has created.
type taggedVBD struct {
	ref         xapi.VBDRef
	uuid, nonce string
	// otherProcess is set if the VBD belongs to another living process of the service.
	otherProcess bool
}

// tagged lists the VBDs that this process or an earlier one has created on this host.
func (m *Manager) tagged(ctx context.Context, s *xapi.Session) ([]taggedVBD, error) {
	h, err := readInventory(ctx, m.cfg.Inventory)
	if err != nil {
		return nil, err
	}
	dom0, err := s.VMByUUID(ctx, h.ControlDomain) // not the remembered ref: a wrong one would find nothing
	if err != nil {
		return nil, err
	}
	m.rememberControlDomain(controlDomain{h.ControlDomain, dom0})
	records, err := s.VBDsOfVM(ctx, dom0)
	if err != nil {
		return nil, fmt.Errorf("VBDs of the control domain: %w", err)
	}
	var found []taggedVBD
	for ref, r := range records {
		t, ok := readTag(r.OtherConfig)
		if !ok || t.installation != h.Installation {
			continue
		}
		other, err := m.ofOtherProcess(t.owner, t.nonce)
		if err != nil {
			return nil, err
		}
		found = append(found, taggedVBD{ref: ref, uuid: r.UUID, nonce: t.nonce, otherProcess: other})
	}
	return found, nil
}

// ownCreates returns the pending calls of VBD.create in the journal, newest first, without
// those of other living processes.
func (m *Manager) ownCreates() (own []pendingCreate, err error) {
	all, err := m.journal.creates()
	if err != nil {
		return nil, err
	}
	for _, c := range all {
		other, err := m.ofOtherProcess("", c.nonce)
		if err != nil {
			return nil, err
		}
		if !other {
			own = append(own, c)
		}
	}
	return own, nil
}

// isPending reports whether the journal still lists a VBD.create as pending.
func (m *Manager) isPending(nonce string) (bool, error) {
	creates, err := m.journal.creates()
	return slices.ContainsFunc(creates, func(c pendingCreate) bool { return c.nonce == nonce }), err
}
