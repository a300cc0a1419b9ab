package auth

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"xapi-nbd/xapi"
)

// minRound is the lower bound of the time limit of a round, however short the pauses are:
// xapi may be slow.
const minRound = 10 * time.Second

// Rechecker checks the sessions of open connections periodically, and ends the connections
// whose session has ended: it was logged out, destroyed because its user was disabled, or
// evicted. A check also counts as use of the session, so none expires during a long copy.
// It is safe for concurrent use.
type Rechecker struct {
	local *xapi.Local
	every time.Duration
	log   *slog.Logger

	mu      sync.Mutex // guards watches
	watches map[*watch]struct{}
}

// watch is one connection. Only the goroutine that removes it from Rechecker.watches calls
// end, so end is called once.
type watch struct {
	session *xapi.Session
	epoch   xapi.Epoch
	end     func(error)
}

// NewRechecker returns a Rechecker for sessions of local's xapi. It pauses for every
// between its rounds; 0 and below turn it off. A nil log discards.
func NewRechecker(local *xapi.Local, every time.Duration, log *slog.Logger) *Rechecker {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Rechecker{local: local, every: every, log: log, watches: make(map[*watch]struct{})}
}

// Watch begins to check the session of a connection.
//
// end is called when the session has ended although xapi has not restarted: at most once,
// by Run, which waits for it. Its error matches ErrSession and contains no ref. stop ends
// the checks: once it has returned end is not called any more, but a call in progress goes
// on. end may call stop.
func (r *Rechecker) Watch(g Grant, end func(error)) (stop func()) {
	if r.every <= 0 {
		return func() {}
	}
	w := &watch{session: g.Session, epoch: g.epoch, end: end}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.watches[w] = struct{}{}
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.watches, w)
	}
}

// Run makes the rounds until ctx ends. It may be called once.
func (r *Rechecker) Run(ctx context.Context) {
	if r.every <= 0 {
		<-ctx.Done()
		return
	}
	pause := time.NewTimer(r.every)
	defer pause.Stop()
	for {
		select {
		case <-pause.C:
			r.round(ctx)
			pause.Reset(r.every) // from the end of the round
		case <-ctx.Done():
			return
		}
	}
}

// round checks each watched session, one after the other. It lasts half a pause at most,
// so a session is checked within two pauses of its first connection; with a slow xapi a
// random part of them is left out.
func (r *Rechecker) round(ctx context.Context) {
	if !r.watching() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, max(r.every/2, minRound))
	defer cancel()
	epoch, err := r.local.Check(ctx)
	if err != nil {
		r.log.DebugContext(ctx, "sessions are not rechecked this time", "err", err)
		return
	}
	for ref, s := range r.sessions(epoch) {
		if ctx.Err() != nil {
			return
		}
		_, err := s.UUID(ctx)
		if err == nil {
			r.adopt(ref, epoch)
		}
		if err = rejection(err); !errors.Is(err, ErrSession) {
			continue // alive, or unknown
		}
		// Only after the answer does the local session show whether xapi restarted before
		// it, or this session alone has ended.
		if now, err := r.local.Check(ctx); err != nil || now != epoch {
			return
		}
		r.exempt(ref, epoch)
		r.end(ref, epoch, err)
	}
}

func (r *Rechecker) watching() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.watches) > 0
}

// sessions returns the distinct watched sessions, except those that began after epoch.
func (r *Rechecker) sessions(epoch xapi.Epoch) map[xapi.SessionRef]*xapi.Session {
	r.mu.Lock()
	defer r.mu.Unlock()
	sessions := make(map[xapi.SessionRef]*xapi.Session)
	for w := range r.watches {
		if w.epoch <= epoch {
			sessions[w.session.Ref()] = w.session
		}
	}
	return sessions
}

// adopt records that xapi knows a session in epoch, also for watches with an earlier one:
// that had already ended when they were made.
func (r *Rechecker) adopt(ref xapi.SessionRef, epoch xapi.Epoch) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for w := range r.watches {
		if w.session.Ref() == ref {
			w.epoch = max(w.epoch, epoch)
		}
	}
}

// exempt removes the watches of an ended session from before epoch: it may have ended by
// the restart of xapi.
func (r *Rechecker) exempt(ref xapi.SessionRef, epoch xapi.Epoch) {
	r.mu.Lock()
	defer r.mu.Unlock()
	exempt := 0
	for w := range r.watches {
		if w.epoch < epoch && w.session.Ref() == ref {
			delete(r.watches, w)
			exempt++
		}
	}
	if exempt > 0 {
		r.log.Info("a session ended, probably in a restart of xapi; its connections go on and are not rechecked any more", "connections", exempt)
	}
}

// end ends the connections of a session.
func (r *Rechecker) end(ref xapi.SessionRef, epoch xapi.Epoch, err error) {
	for {
		w := r.take(ref, epoch)
		if w == nil {
			return
		}
		w.end(err)
	}
}

// take removes one watch of a session and returns it, nil if there is none. It takes one
// at a time, because others may be stopped while one connection is ended.
func (r *Rechecker) take(ref xapi.SessionRef, epoch xapi.Epoch) *watch {
	r.mu.Lock()
	defer r.mu.Unlock()
	for w := range r.watches {
		if w.epoch == epoch && w.session.Ref() == ref {
			delete(r.watches, w)
			return w
		}
	}
	return nil
}
