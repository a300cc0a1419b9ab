package auth

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"xapi-nbd/xapi"
)

// minRound is the least that a round may take: short rests are no reason to give
// up a slow xapi.
const minRound = 10 * time.Second

// Rechecker looks again, every so often, at the sessions of connections that go
// on, and ends those whose session was ended: logged out, destroyed because its
// user was disabled, evicted. Asking also counts as use of the session, so that
// none expires by idleness under a long copy. It is safe for concurrent use.
type Rechecker struct {
	local *xapi.Local
	every time.Duration
	log   *slog.Logger

	mu      sync.Mutex // guards watches
	watches map[*watch]struct{}
}

// watch is one connection. Whoever takes it out of Rechecker.watches may call
// end, so that this happens once.
type watch struct {
	session *xapi.Session
	epoch   xapi.Epoch
	end     func(error)
}

// NewRechecker returns a Rechecker for sessions of local's xapi. It rests for
// every between its rounds; 0 and below turn it off. A nil log discards.
func NewRechecker(local *xapi.Local, every time.Duration, log *slog.Logger) *Rechecker {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Rechecker{local: local, every: every, log: log, watches: make(map[*watch]struct{})}
}

// Watch begins to look after the session of a connection.
//
// end is called when xapi has ended the session although it has not restarted;
// at most once, from the goroutine of Run, which waits for it. Its error matches
// ErrSession and holds no ref. stop ends the watching: after it returned end is
// not called any more, unless it is being called right now. end may call stop.
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

// Run makes the rounds until ctx ends. It is for one caller.
func (r *Rechecker) Run(ctx context.Context) {
	if r.every <= 0 {
		<-ctx.Done()
		return
	}
	rest := time.NewTimer(r.every)
	defer rest.Stop()
	for {
		select {
		case <-rest.C:
			r.round(ctx)
			rest.Reset(r.every) // from the end of the round
		case <-ctx.Done():
			return
		}
	}
}

// round asks xapi about each session that is watched, one after the other. It
// lasts half a rest at most, so that a session is asked about within two rests of
// its first connection; which ones a slow xapi leaves over is random.
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
			continue // alive, or nothing learned
		}
		// Only now, after the answer, can the local session tell a restart of xapi
		// before it from an end of this session alone.
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

// sessions returns the watched sessions, each once however many connections
// share it, less those that began after epoch.
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

// adopt notes that a session is known in epoch, also to watches from before it:
// the epoch that they were given had ended without anybody knowing.
func (r *Rechecker) adopt(ref xapi.SessionRef, epoch xapi.Epoch) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for w := range r.watches {
		if w.session.Ref() == ref {
			w.epoch = max(w.epoch, epoch)
		}
	}
}

// exempt ends the watches of a dead session from before epoch: nobody can tell
// any more whether somebody ended it or a restart of xapi did.
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

// take takes out one watch of a session, nil when there is none left. One at a
// time: while one connection is being ended, others may be stopped.
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
