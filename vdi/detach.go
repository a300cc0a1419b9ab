package vdi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"xapi-nbd/xapi"
)

// Pauses between the tries of a detach: short at first, because backup tools
// give a VBD about four seconds to go.
const (
	firstPause = 100 * time.Millisecond
	lastPause  = 5 * time.Second
)

// detach undoes whatever attach did, however far it came, and returns when that
// is done or DetachTimeout has passed; then it is left to recovery.
func (a *attachment) detach(ctx context.Context) {
	if a.dev != nil {
		// No read is in flight: all users have closed their Disks. An open
		// descriptor would make xapi refuse the unplug.
		if err := a.dev.Close(); err != nil {
			a.log.Error("cannot close the device", "err", err)
		}
	}
	if !a.mayExist {
		a.move(gone)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, a.m.cfg.DetachTimeout)
	defer cancel()
	ask := false // nothing is unknown yet
	err := retry(ctx, a.log, "detach", func(ctx context.Context) error {
		defer func() { ask = true }()
		return a.tryDetach(ctx, ask)
	})
	if err != nil {
		a.log.Error("VBD left for recovery", "vbd", a.vbdUUID, "err", err)
		a.move(left)
		a.orphaned = true
		return
	}
	a.move(gone)
}

// retry calls try with growing pauses until it succeeds or ctx ends.
func retry(ctx context.Context, log *slog.Logger, what string, try func(context.Context) error) error {
	for pause := firstPause; ; pause = min(2*pause, lastPause) {
		err := try(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return err
		}
		log.Warn(what+" failed, trying again", "err", err, "again_in", pause.String())
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause):
		}
	}
}

// tryDetach makes one attempt, with ask beginning with a question about where
// the one before it has led. Its local session is a fresh one: the client's may
// be dead, and so may one of ours from before a restart of xapi.
func (a *attachment) tryDetach(ctx context.Context, ask bool) error {
	if a.currentStage() == detaching {
		s, err := a.m.cfg.Client.Login(ctx, Originator)
		if err != nil {
			return err
		}
		defer logout(ctx, s, a.log)
		if a.vbd == "" {
			if err := a.find(ctx, s); err != nil || a.vbd == "" {
				return err // without a match there is nothing to remove
			}
		}
		if err := removeVBD(ctx, s, a.vbd, ask); err != nil {
			return err
		}
		a.log.Info("VBD unplugged and destroyed", "vbd", a.vbdUUID)
		if !a.journaled {
			return nil
		}
		a.move(forgetting)
	}
	return a.m.journal.forget(a.vbdUUID)
}

// find looks for a VBD whose create was not answered. Without a match there is
// none, or xapi has not made it yet: recovery will see that one by its tag.
func (a *attachment) find(ctx context.Context, s *xapi.Session) error {
	tagged, err := a.m.tagged(ctx, s)
	if err != nil {
		return err
	}
	for _, v := range tagged {
		if v.nonce == a.nonce {
			a.vbd = v.ref
			a.m.mu.Lock()
			a.vbdUUID = v.uuid
			a.m.mu.Unlock()
			return nil
		}
	}
	a.orphaned = true
	return nil
}

// removeVBD takes a VBD from any state to none; nil means that it is certainly
// gone. With ask it first asks xapi what the state is, and does not interfere
// with work that is under way: an unplug whose answer was lost goes on, and so
// does a plug that another process began. Every error is worth another try.
func removeVBD(ctx context.Context, s *xapi.Session, ref xapi.VBDRef, ask bool) error {
	plugged := true
	if ask {
		record, err := s.VBDRecord(ctx, ref)
		switch {
		case isGone(err):
			return nil
		case err != nil:
			return err
		}
		if err := unfinished(record); err != nil {
			return err
		}
		plugged = record.CurrentlyAttached
	}
	if plugged {
		err := s.UnplugVBD(ctx, ref)
		if err != nil && !errors.Is(err, xapi.DeviceAlreadyDetached) && !isGone(err) {
			return err
		}
	}
	if err := s.DestroyVBD(ctx, ref); err != nil && !isGone(err) {
		return err
	}
	return nil
}

// isGone reports whether xapi says that the VBD does not exist. A dead session
// is HANDLE_INVALID too, of another class, and proves nothing.
func isGone(err error) bool {
	var e *xapi.Error
	if !errors.As(err, &e) || len(e.Params) == 0 || e.Params[0] != "VBD" {
		return false
	}
	return e.Code == xapi.HandleInvalid || e.Code == xapi.UUIDInvalid
}

// logout ends a local session; xapi keeps only so many of one originator.
func logout(ctx context.Context, s *xapi.Session, log *slog.Logger) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), logoutTimeout)
	defer cancel()
	if err := s.Logout(ctx); err != nil && !errors.Is(err, xapi.SessionInvalid) {
		log.Debug("cannot log out", "err", err)
	}
}

// logoutTimeout bounds what is only tidiness.
const logoutTimeout = 5 * time.Second

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
		if nonce, ok := nonceOf(r.OtherConfig, h.installation); ok {
			found = append(found, taggedVBD{ref: ref, uuid: r.UUID, nonce: nonce})
		}
	}
	return found, nil
}
