package vdi

import (
	"context"
	"errors"
	"log/slog"
	"time"
)

// detachTimeout bounds the one attempt that an attachment makes to remove its VBD. If the
// attempt fails or takes longer, the VBD becomes a leftover.
const detachTimeout = time.Minute

// detach closes the device and removes the VBD, after attach has succeeded or failed at
// any step. It returns nil when nothing is left, and else the VBD as a leftover.
func (a *attachment) detach(ctx context.Context) *leftover {
	r := &removal{
		m: a.m, log: a.log, nonce: a.nonce, vbd: a.vbd, gone: !a.mayExist,
		uuid: a.vbdUUID, vdi: a.vdi,
	}
	if a.vbd == "" {
		r.created, r.epoch = a.created, a.epoch
	}
	// An open image can make the storage manager fail to deactivate its volume. The end of
	// the attachment's life has ended the helpers; 2 s if the storage hangs.
	a.helpers.Wait()
	if a.dev != nil {
		if a.isWritable() {
			a.flushLast()
		}
		r.device = a.device
		r.record, r.noted = a.dev.Record()
		// With an open descriptor xapi would refuse the unplug.
		if !a.leaveOpen() {
			a.closeDevice()
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

// leaveOpen reports whether the attachment still has users, because Close has given up waiting
// for them. Then the last of them closes the device: a read or write in flight uses the number of
// the descriptor, and after a close that could be the number of another file.
func (a *attachment) leaveOpen() bool {
	a.m.mu.Lock()
	defer a.m.mu.Unlock()
	a.leftOpen = a.err == nil && a.users > 0 // those who wait for an attach that failed have no Disk
	return a.leftOpen
}

// closeDevice closes the device, which nobody uses any more.
func (a *attachment) closeDevice() {
	if err := a.dev.Close(); err != nil {
		a.log.Error("cannot close the device", "err", err)
	}
}

// tryDetach makes one attempt to remove the VBD, and sets the stages of the attachment.
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

// The first and the longest pause between two attempts. The first is short because backup
// tools wait only about four seconds for a VBD to go.
const (
	firstPause = 100 * time.Millisecond
	lastPause  = 5 * time.Second
)

// retry calls try with growing pauses until it succeeds or ctx ends. It logs each failure
// under the name operation.
func retry(ctx context.Context, log *slog.Logger, operation string, try func(context.Context) error) error {
	for pause := firstPause; ; pause = min(2*pause, lastPause) {
		err := try(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return err
		}
		log.Warn(operation+" failed, trying again", "err", err, "again_in", pause.String())
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause):
		}
	}
}

// isUnderWay reports whether xapi may still be working on the VBD after an attempt that
// failed with err.
func (r *removal) isUnderWay(err error) bool {
	return errors.Is(err, errBusy) || r.phase == unplugging && answerLost(err)
}
