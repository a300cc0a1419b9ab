package auth

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

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

// sessionError carries xapi's code to the peer and the whole error to the log.
type sessionError struct{ err *xapi.Error }

func (e *sessionError) Error() string {
	return fmt.Sprintf("%v (%s)", ErrSession, e.err.Code)
}

func (e *sessionError) Unwrap() []error { return []error{ErrSession, e.err} }

// Authorizer checks clients' sessions. It keeps no state: a session may be
// logged out at any time, so every answer is asked for afresh.
type Authorizer struct{ client *xapi.Client }

// NewAuthorizer returns an Authorizer that asks c.
func NewAuthorizer(c *xapi.Client) *Authorizer { return &Authorizer{client: c} }

// Authorize returns the request's session if xapi knows it and its role may
// plug a disk. It is one call, for the session's own record with the session
// itself: the answer proves the one and holds the other.
//
// A session that xapi rejects is an error matching ErrSession, a role that may
// not create and plug a VBD a *PermissionError; other errors of xapi and of the
// transport are passed on and say nothing about the session. xapi checks the role
// again at VBD.create; asking before means that an unprivileged client gets a
// clear refusal also for a VDI that is already attached for somebody else. The
// caller must not log the session out, it is the client's.
func (a *Authorizer) Authorize(ctx context.Context, r Request) (*xapi.Session, error) {
	s := a.client.Bind(r.Session)
	record, err := s.Record(ctx)
	if err != nil {
		return nil, rejection(err)
	}
	if err := mayPlug(record); err != nil {
		return nil, err
	}
	return s, nil
}

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

// rejection marks the answers by which xapi turns a session down
// (session_check.ml, xapi_local_session.ml).
func rejection(err error) error {
	e, ok := errors.AsType[*xapi.Error](err)
	if !ok {
		return err
	}
	switch e.Code {
	case xapi.SessionInvalid, xapi.InvalidValue:
		return &sessionError{e}
	case xapi.HandleInvalid:
		if len(e.Params) > 0 && strings.EqualFold(e.Params[0], "session") {
			return &sessionError{e}
		}
	}
	return err
}
