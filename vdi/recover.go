package vdi

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"xapi-nbd/xapi"
)

// Recover removes what earlier processes left behind: the VBDs of the journal
// and the tagged ones of this host's control domain, less those in use now. It
// makes one attempt at each; the error joins what failed, and whatever failed
// stays where the next Recover finds it. Never touches a VBD that is neither in
// the journal nor tagged.
func (m *Manager) Recover(ctx context.Context) error {
	s, err := m.cfg.Client.Login(ctx, Originator)
	if err != nil {
		return err
	}
	defer logout(ctx, s, m.log)
	return errors.Join(m.recoverJournal(ctx, s), m.recoverTagged(ctx, s))
}

// recoverJournal removes the VBDs of the journal.
func (m *Manager) recoverJournal(ctx context.Context, s *xapi.Session) error {
	// The list comes before the look at what is in use: an attachment that
	// enters the journal in between is seen to be in use.
	uuids, err := m.journal.list()
	if err != nil {
		return err
	}
	// Oldest first.
	slices.Reverse(uuids)
	var failed []error
	for _, uuid := range uuids {
		if m.own(uuid, "") {
			continue
		}
		if err := m.recoverOne(ctx, s, uuid); err != nil {
			m.log.Error("cannot remove a VBD that was left behind", "vbd", uuid, "err", err)
			failed = append(failed, fmt.Errorf("VBD %s: %w", uuid, err))
		}
	}
	return errors.Join(failed...)
}

func (m *Manager) recoverOne(ctx context.Context, s *xapi.Session, uuid string) error {
	ref, err := s.VBDByUUID(ctx, uuid)
	switch {
	case isGone(err):
		m.log.Info("VBD of the journal is gone already", "vbd", uuid)
		return m.journal.forget(uuid)
	case err != nil:
		return err
	}
	if err := destroyVBD(ctx, s, ref); err != nil {
		return err
	}
	m.log.Info("removed a VBD that was left behind", "vbd", uuid)
	return m.journal.forget(uuid)
}

// recoverTagged removes VBDs that never reached the journal.
func (m *Manager) recoverTagged(ctx context.Context, s *xapi.Session) error {
	tagged, err := m.tagged(ctx, s)
	if err != nil {
		return err
	}
	var failed []error
	for _, v := range tagged {
		if m.own(v.uuid, v.nonce) {
			continue
		}
		if err := destroyVBD(ctx, s, v.ref); err != nil {
			m.log.Error("cannot remove a VBD that was left behind", "vbd", v.uuid, "err", err)
			failed = append(failed, fmt.Errorf("VBD %s: %w", v.uuid, err))
			continue
		}
		m.log.Info("removed a VBD that was left behind", "vbd", v.uuid)
	}
	return errors.Join(failed...)
}
