package auth

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"xapi-nbd/xapi"
)

var (
	// ErrSession means that xapi rejected the session. The error also holds the *xapi.Error.
	ErrSession = errors.New("session rejected by xapi")
	// ErrPermission means that the session is valid but its role may not plug a VBD. The
	// error is a *PermissionError.
	ErrPermission = errors.New("missing permission")
)

// PermissionError names the permission that a session lacks.
type PermissionError struct {
	Permission string // xapi's spelling in lower case, "vbd.plug"
}

// Error names the missing permission.
func (e *PermissionError) Error() string { return ErrPermission.Error() + " " + e.Permission }

// Unwrap returns ErrPermission.
func (e *PermissionError) Unwrap() error { return ErrPermission }

// sessionError has xapi's code in its text, which the peer reads, and wraps the whole error
// for the log.
type sessionError struct{ err *xapi.Error }

func (e *sessionError) Error() string {
	return fmt.Sprintf("%v (%s)", ErrSession, e.err.Code)
}

func (e *sessionError) Unwrap() []error { return []error{ErrSession, e.err} }

// Authorizer checks clients' sessions. A session may be logged out at any time, so each
// check calls xapi; only a rejection is remembered, for seconds. It is safe for concurrent
// use.
type Authorizer struct {
	client *xapi.Client
	local  *xapi.Local
	queue  queue
	memory *memory
}

// NewAuthorizer returns an Authorizer that asks c. local is a session of c's xapi.
func NewAuthorizer(c *xapi.Client, local *xapi.Local) *Authorizer {
	return &Authorizer{client: c, local: local, memory: newMemory()}
}

// Grant is a session that xapi knows and whose role may plug a disk.
type Grant struct {
	Session *xapi.Session
	// epoch is that of the local session during which xapi knew Session.
	epoch xapi.Epoch
}

// Authorize returns the request's session if xapi knows it and its role may
// plug a disk. That is two calls: one for the session's own record with the session
// itself, whose answer proves that xapi knows it and has its role, and one with the local
// session, for the Grant's epoch. A session that is rejected costs the first one, or
// none if it was rejected a moment ago.
//
// peer is the address that the request comes from. The sessions of peers with recent
// rejections are checked after all others and with growing delays; beyond the limits they
// fail with ErrTooManyRejections, without a call.
//
// A session that xapi rejects is an error matching ErrSession, a role that may
// not create and plug a VBD a *PermissionError; other errors of xapi and of the
// transport are returned as they are and say nothing about the session. xapi checks the
// role again at VBD.create; with the check here an unprivileged client also gets a clear
// refusal for a VDI that is already attached for another client. The caller must not log
// the session out: it is the client's.
func (a *Authorizer) Authorize(ctx context.Context, peer string, r Request) (Grant, error) {
	id := a.memory.digest(r.Session)
	if err := a.memory.rejection(id); err != nil {
		return Grant{}, err
	}
	permit, err := a.queue.wait(ctx, peer, a.memory.wasAccepted(id))
	if err != nil {
		return Grant{}, err
	}
	result := unanswered
	defer func() { permit.end(result) }()
	if err := a.memory.rejection(id); err != nil {
		return Grant{}, err // found by another connection while this one waited
	}
	grant, err := a.ask(ctx, a.client.Bind(r.Session))
	switch {
	case err == nil:
		result = accepted
		a.memory.accept(id)
	case errors.Is(err, ErrSession):
		result = rejected
		a.memory.reject(id, err)
	case errors.Is(err, ErrPermission):
		result = rejected
	}
	return grant, err
}

// maxRestarts bounds the repetitions of a check because xapi has restarted meanwhile.
const maxRestarts = 3

// ask checks the session, and then with the local session whether xapi has restarted
// meanwhile. If so, the client's session may be from before or after the restart, so it
// is checked again. After maxRestarts the epoch before the last restart is used: a session
// is never ended for being from an earlier epoch.
func (a *Authorizer) ask(ctx context.Context, s *xapi.Session) (Grant, error) {
	epoch, err := a.local.Epoch(ctx)
	if err != nil {
		return Grant{}, err
	}
	for restarts := 0; ; restarts++ {
		record, err := s.Record(ctx)
		if err != nil {
			return Grant{}, rejection(err)
		}
		if err := mayPlug(record); err != nil {
			return Grant{}, err
		}
		now, err := a.local.Check(ctx)
		switch {
		case err != nil:
			return Grant{}, err
		case now == epoch || restarts == maxRestarts:
			return Grant{Session: s, epoch: epoch}, nil
		}
		epoch = now
	}
}

// mayPlug returns a PermissionError unless the session's role may create and plug a VBD. For
// a VBD with mode RW xapi asks for the same permissions: they are those of vm-admin, which
// may also write to a VDI through HTTP.
func mayPlug(record xapi.SessionRecord) error {
	// Root and pool sessions may do everything and have an empty list (rbac.ml).
	if record.IsLocalSuperuser || record.Pool {
		return nil
	}
	for _, permission := range []string{"vbd.create", "vbd.plug"} {
		if !slices.Contains(record.RBACPermissions, permission) {
			return &PermissionError{Permission: permission}
		}
	}
	return nil
}

// rejection converts the errors with which xapi rejects a session into sessionErrors
// (session_check.ml, xapi_local_session.ml). It returns other errors unchanged.
func rejection(err error) error {
	e, ok := errors.AsType[*xapi.Error](err)
	if !ok {
		return err
	}
	if xapi.SessionEnded(e) || e.Code == xapi.InvalidValue {
		return &sessionError{e}
	}
	return err
}
