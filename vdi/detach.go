package vdi

import (
	"context"
	"errors"
	"log/slog"
	"time"
)

// detachTimeout bounds the one attempt that an attachment makes to remove its
// VBD. What takes longer, or fails, is gone on with as a leftover.
const detachTimeout = time.Minute

// detach undoes whatever attach did, however far it came. It returns nil when that
// is done, and otherwise what is left to be removed.
func (a *attachment) detach(ctx context.Context) *leftover {
	r := &removal{
		m: a.m, log: a.log, nonce: a.nonce, vbd: a.vbd, gone: !a.mayExist,
		uuid: a.vbdUUID, vdi: a.vdi,
	}
	if a.vbd == "" {
		r.created, r.epoch = a.created, a.epoch
	}
	if a.dev != nil {
		r.device = a.device
		r.record, r.noted = a.dev.Record()
		// No read is in flight: all users have closed their Disks. An open
		// descriptor would make xapi refuse the unplug.
		if err := a.dev.Close(); err != nil {
			a.log.Error("cannot close the device", "err", err)
		}
	}
	if r.gone && !a.recorded {
		a.move(gone)
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, detachTimeout)
	defer cancel()
	err := a.tryDetach(ctx, r)
	if err == nil {
		a.move(gone)
		return nil
	}
	a.move(left)
	l := newLeftover(r, a.endingSince)
	l.failed(err)
	return l
}

// tryDetach is one attempt at a removal, in the stages of an attachment.
func (a *attachment) tryDetach(ctx context.Context, r *removal) error {
	if !r.gone {
		defer func() { r.ask = true }()
		if err := r.remove(ctx); err != nil {
			return err
		}
		r.gone = true
		a.log.Info("VBD unplugged and destroyed", "vbd", r.uuid)
	}
	a.move(forgetting)
	r.phase = finishing
	return r.forget()
}

// Pauses between the tries of something that fails: short at first, because
// backup tools give a VBD about four seconds to go.
const (
	firstPause = 100 * time.Millisecond
	lastPause  = 5 * time.Second
)

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

// isUnderWay reports whether xapi may be at work on the VBD after a try that ended
// with err.
func (r *removal) isUnderWay(err error) bool {
	return errors.Is(err, errBusy) || r.phase == unplugging && answerLost(err)
}
