package xapi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
)

// Local keeps one local root session for the questions that anybody may ask, so
// that not each of them costs a login and a logout. It is not for plugging and
// unplugging: those use sessions of their own. It is safe for concurrent use; the
// caller must Close it.
type Local struct {
	client     *Client
	originator string
	ctx        context.Context // of the logins, which outlive those who wait for them
	cancel     context.CancelFunc

	mu      sync.Mutex // guards all below
	session *Session   // nil: none yet, or xapi does not know the last one any more
	epoch   Epoch      // of session, or of the last one
	login   *login     // under way, or nil
	spare   []*Session // alive when they were replaced
	closed  bool
}

// Epoch numbers the sessions of a Local, from 1. A session that xapi knew during
// the current epoch and does not know any more was ended by somebody; one from
// an earlier epoch may have died in a restart of xapi, which ends all of them.
type Epoch uint64

// login is one login, for all who wait for it.
type login struct {
	done    chan struct{} // closed when the rest is set
	session *Session
	epoch   Epoch
	err     error
}

var errLocalClosed = fmt.Errorf("xapi: local session: %w", net.ErrClosed)

// NewLocal returns a Local that logs in to c's xapi when it is first needed.
// originator is that of Client.Login.
func NewLocal(c *Client, originator string) *Local {
	ctx, cancel := context.WithCancel(context.Background())
	return &Local{client: c, originator: originator, ctx: ctx, cancel: cancel}
}

// Do calls f with the session, after a login when there is none. When f's error
// is that the session is dead (SESSION_INVALID, or HANDLE_INVALID of a session),
// Do logs in again and calls f once more. f must make calls with this session
// only: the error of another one would count as this one's.
//
// There is one login at a time. The end of ctx ends the caller's wait for it,
// not the login that others may be waiting for. Errors are those of the login,
// of f, and after Close one matching net.ErrClosed.
func (l *Local) Do(ctx context.Context, f func(*Session) error) error {
	s, epoch, err := l.current(ctx)
	if err != nil {
		return err
	}
	if err = f(s); !sessionEnded(err) {
		return err
	}
	if s, _, err = l.replace(ctx, epoch); err != nil {
		return err
	}
	return f(s)
}

// Epoch returns the number of the session, after a login when there is none and
// otherwise without a call. Its errors are those of Do.
func (l *Local) Epoch(ctx context.Context) (Epoch, error) {
	_, epoch, err := l.current(ctx)
	return epoch, err
}

// Check asks xapi whether the session is alive (session.get_uuid), replaces it if
// not, and returns the epoch after that: the same as before means that xapi has
// not restarted in between. Its errors are those of Do; they leave the question
// open.
func (l *Local) Check(ctx context.Context) (Epoch, error) {
	s, epoch, err := l.current(ctx)
	if err != nil {
		return 0, err
	}
	if _, err = s.UUID(ctx); sessionEnded(err) {
		_, epoch, err = l.replace(ctx, epoch)
	}
	if err != nil {
		return 0, err
	}
	return epoch, nil
}

// Adopt makes s, which was just logged in, the session; that begins an epoch.
// From now on s is Local's to log out. Not to be called after Close.
func (l *Local) Adopt(s *Session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.install(s)
}

// Close logs out. A login under way is waited for, else its session would be
// left behind. ctx bounds all this; what could not be logged out by then is in
// the error, and xapi expires it by itself. Closing twice is harmless.
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
		<-pending.done // at once now
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
		if err := s.Logout(ctx); !sessionEnded(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// current returns the session and its epoch. Without one it starts a login, or
// joins the one under way.
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

// replace is current for a caller who learned that the session of epoch is dead.
func (l *Local) replace(ctx context.Context, epoch Epoch) (*Session, Epoch, error) {
	l.mu.Lock()
	if l.epoch == epoch { // else somebody else was faster
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
	}
	pending.session, pending.epoch, pending.err = s, l.epoch, err
	l.login = nil
	close(pending.done)
}

// install makes s the session; l.mu is held.
func (l *Local) install(s *Session) {
	if l.session != nil {
		l.spare = append(l.spare, l.session)
	}
	l.session = s
	l.epoch++
}

// sessionEnded reports whether err is xapi's answer that it does not know the
// calling session. HANDLE_INVALID comes when it ended during the call.
func sessionEnded(err error) bool {
	e, ok := errors.AsType[*Error](err)
	if !ok {
		return false
	}
	return e.Code == SessionInvalid ||
		e.Code == HandleInvalid && len(e.Params) > 0 && strings.EqualFold(e.Params[0], "session")
}
