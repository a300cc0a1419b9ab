package vdi

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"xapi-nbd/xapi"
)

// RecoveryWanted receives when something was left behind that Recover can see to:
// a detach gave up, or nobody knows whether a VBD.create was executed, and its
// attachment is no more.
func (m *Manager) RecoveryWanted() <-chan struct{} { return m.wanted }

func (m *Manager) wantRecovery() {
	select {
	case m.wanted <- struct{}{}:
	default: // it is known already
	}
}

// Recovered is what one Recover came to, in uuids of VBDs.
type Recovered struct {
	Removed []string // gone now; those that were gone already are not listed
	Left    []string // still to be removed
}

// Recover removes what earlier processes left behind: the VBDs of the journal
// and the tagged ones of this host's control domain, less those in use now. It
// makes one attempt at each; the error joins what failed, and whatever failed
// stays where the next Recover finds it. Never touches a VBD that is neither in
// the journal nor tagged.
func (m *Manager) Recover(ctx context.Context) (Recovered, error) {
	if !m.locked.Load() {
		return Recovered{}, ErrNotLocked
	}
	m.recovering.Lock()
	defer m.recovering.Unlock()
	s, err := m.cfg.Client.Login(ctx, Originator)
	if err != nil {
		left, jerr := m.journal.list()
		return Recovered{Left: left}, errors.Join(err, jerr)
	}
	defer logout(ctx, s, m.log)
	r := &recovery{m: m, s: s}
	err = errors.Join(r.journal(ctx), r.tagged(ctx))
	return r.result, err
}

// recovery is one Recover under way.
type recovery struct {
	m      *Manager
	s      *xapi.Session
	result Recovered
}

// journal removes the VBDs of the journal.
func (r *recovery) journal(ctx context.Context) error {
	// The list comes before the look at what is in use: an attachment that
	// enters the journal in between is seen to be in use.
	uuids, err := r.m.journal.list()
	if err != nil {
		return err
	}
	// Oldest first.
	slices.Reverse(uuids)
	var failed []error
	for _, uuid := range uuids {
		if r.m.own(uuid, "") {
			continue
		}
		ref, err := r.s.VBDByUUID(ctx, uuid)
		if isGone(err) {
			r.m.log.Info("VBD of the journal is gone already", "vbd", uuid)
			failed = append(failed, r.m.journal.forget(uuid))
			continue
		}
		if err == nil {
			err = removeVBD(ctx, r.s, ref, true)
		}
		if err == nil {
			err = r.m.journal.forget(uuid)
		}
		failed = append(failed, r.note(uuid, err))
	}
	return errors.Join(failed...)
}

// tagged removes VBDs that never reached the journal.
func (r *recovery) tagged(ctx context.Context) error {
	tagged, err := r.m.tagged(ctx, r.s)
	if err != nil {
		return err
	}
	var failed []error
	for _, v := range tagged {
		if r.m.own(v.uuid, v.nonce) || slices.Contains(r.result.Left, v.uuid) {
			continue
		}
		failed = append(failed, r.note(v.uuid, removeVBD(ctx, r.s, v.ref, true)))
	}
	return errors.Join(failed...)
}

// note puts down how it went with one VBD.
func (r *recovery) note(uuid string, err error) error {
	if err != nil {
		r.m.log.Error("cannot remove a VBD that was left behind", "vbd", uuid, "err", err)
		r.result.Left = append(r.result.Left, uuid)
		return fmt.Errorf("VBD %s: %w", uuid, err)
	}
	r.m.log.Info("removed a VBD that was left behind", "vbd", uuid)
	r.result.Removed = append(r.result.Removed, uuid)
	return nil
}
