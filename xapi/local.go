package xapi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
)

// Local keeps one local root session for read-only calls, so that each of them does not need
// a login and a logout. Plugging and unplugging use sessions of their own. It is safe for
// concurrent use; the caller must Close it.
type Local struct {
	client     *Client
	originator string
	ctx        context.Context // of the logins, which outlive those who wait for them
	cancel     context.CancelFunc

	mu      sync.Mutex // guards the fields below
	session *Session   // nil: none yet, or the last one has ended
	epoch   Epoch      // of session, or of the last one
	login   *login     // in progress, or nil
	spare   []*Session // valid ones from when there was a session already
	closed  bool
}

// Epoch numbers the sessions of a Local, from 1. An epoch ends only when xapi rejects the
// session of the Local. So a client's session that was valid during the current epoch and is
// no longer valid was ended by a client; one of an earlier epoch may have ended by a restart
// of xapi, which ends all sessions.
//
// The end of an epoch means that xapi has restarted (on a pool supporter: the master's
// xapi), provided that the session did not expire, which takes 24 hours without a call, and
// was not evicted: xapi keeps 500 sessions of one originator.
type Epoch uint64

// login is one login, shared by all callers that wait for it.
type login struct {
	done    chan struct{} // closed when the other fields are set
	session *Session
	epoch   Epoch
	err     error
}

var errLocalClosed = fmt.Errorf("xapi: local session: %w", net.ErrClosed)

// NewLocal returns a Local that logs in to c's xapi at the first call. originator is that of
// Client.Login.
func NewLocal(c *Client, originator string) *Local {
	ctx, cancel := context.WithCancel(context.Background())
	return &Local{client: c, originator: originator, ctx: ctx, cancel: cancel}
}

// Do calls f with the session, after a login if there is none. If f's error means that the
// session has ended (SESSION_INVALID, or HANDLE_INVALID of a session), Do logs in again and
// calls f once more. f must make calls with this session only, because Do takes any such
// error for one of this session.
//
// There is one login at a time. The end of ctx ends the caller's wait for it, but not the
// login, which others may be waiting for. The error is that of the login or of f, and after
// Close one that matches net.ErrClosed.
func (l *Local) Do(ctx context.Context, f func(*Session) error) error {
	s, epoch, err := l.current(ctx)
	if err != nil {
		return err
	}
	if err = f(s); !SessionEnded(err) {
		return err
	}
	if s, _, err = l.replace(ctx, epoch); err != nil {
		return err
	}
	return f(s)
}

// Epoch returns the number of the session. It logs in if there is none, and otherwise makes
// no call. Its errors are those of Do.
func (l *Local) Epoch(ctx context.Context) (Epoch, error) {
	_, epoch, err := l.current(ctx)
	return epoch, err
}

// Check checks with a call that the session is valid (session.get_uuid), replaces it if it
// is not, and returns the epoch: the same as before means that xapi has not restarted in
// between. Its errors are those of Do; with an error it is unknown whether xapi restarted.
func (l *Local) Check(ctx context.Context) (Epoch, error) {
	s, epoch, err := l.current(ctx)
	if err != nil {
		return 0, err
	}
	if _, err = s.UUID(ctx); SessionEnded(err) {
		_, epoch, err = l.replace(ctx, epoch)
	}
	if err != nil {
		return 0, err
	}
	return epoch, nil
}

// Adopt makes s, a new session, the session of Local if there is none, and that begins an
// epoch. Local logs s out in any case. Adopt must not be called after Close.
func (l *Local) Adopt(s *Session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.install(s)
}

// Close logs out. It waits for a login in progress, whose session would be left otherwise.
// When ctx ends first the error names the sessions that are left, which xapi expires. A
// second Close does nothing.
func (l *Local) Close(ctx context.Context) error {
	l.mu.Lock()
	l.closed = true
	pending := l.login
	l.mu.Unlock()
	if pending != nil {
		select {
		case <-pending.done:
		case <-ctx.Done():
		}
	}
	l.cancel()
	if pending != nil {
		<-pending.done // soon, because the context has ended
	}

	l.mu.Lock()
	sessions := l.spare
	if l.session != nil {
		sessions = append(sessions, l.session)
	}
	l.session, l.spare = nil, nil
	l.mu.Unlock()
	var errs []error
	for _, s := range sessions {
		if err := s.Logout(ctx); !SessionEnded(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// current returns the session and its epoch. If there is none it starts a login or waits for
// the one in progress.
func (l *Local) current(ctx context.Context) (*Session, Epoch, error) {
	l.mu.Lock()
	if l.closed || l.session != nil {
		defer l.mu.Unlock()
		if l.closed {
			return nil, 0, errLocalClosed
		}
		return l.session, l.epoch, nil
	}
	pending := l.login
	if pending == nil {
		pending = &login{done: make(chan struct{})}
		l.login = pending
		go l.logIn(pending) // ends by the client's time limit or with Close
	}
	l.mu.Unlock()

	select {
	case <-pending.done:
		return pending.session, pending.epoch, pending.err
	case <-ctx.Done():
		return nil, 0, &TransportError{Method: loginMethod, Sent: true, Err: contextError(ctx)}
	}
}

// replace returns the session like current, for a caller that found that of epoch ended.
func (l *Local) replace(ctx context.Context, epoch Epoch) (*Session, Epoch, error) {
	l.mu.Lock()
	if l.epoch == epoch { // else another caller was faster
		l.session = nil
	}
	l.mu.Unlock()
	return l.current(ctx)
}

func (l *Local) logIn(pending *login) {
	s, err := l.client.Login(l.ctx, l.originator)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil {
		l.install(s)
		s = l.session
	}
	pending.session, pending.epoch, pending.err = s, l.epoch, err
	l.login = nil
	close(pending.done)
}

// install makes s the session unless there is one; l.mu is held.
func (l *Local) install(s *Session) {
	if l.session != nil { // as far as anybody knows xapi has not ended it
		l.spare = append(l.spare, s)
		return
	}
	l.session = s
	l.epoch++
}
