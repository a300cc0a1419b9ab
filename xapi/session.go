package xapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"
)

// Session makes calls with the permissions of one session. It is safe for concurrent use and
// is formatted and logged as "<session>". When xapi ends the session calls fail with
// SessionInvalid.
type Session struct {
	c *Client
	// A pointer, because fmt prints unexported fields raw, without asking the
	// type's Format method, but does not follow pointers inside structs.
	ref *SessionRef
}

// Bind returns a Session for a ref that was obtained elsewhere, such as a client's. It makes
// no call.
func (c *Client) Bind(ref SessionRef) *Session { return &Session{c: c, ref: &ref} }

// Ref returns the session's ref, a secret.
func (s *Session) Ref() SessionRef { return *s.ref }

// Format implements fmt.Formatter.
func (s *Session) Format(f fmt.State, _ rune) { io.WriteString(f, redacted) }

// LogValue implements slog.LogValuer.
func (s *Session) LogValue() slog.Value { return slog.StringValue(redacted) }

// UUID returns the session's uuid (session.get_uuid with the session itself as self). It is
// the cheapest check that a session is valid, and every role may make the call.
func (s *Session) UUID(ctx context.Context) (string, error) {
	return getText[string](ctx, s, "session.get_uuid", string(*s.ref))
}

// SessionRecord is the part of session.get_record about permissions.
type SessionRecord struct {
	UUID string `xmlrpc:"uuid"`
	// IsLocalSuperuser is set for root. RBACPermissions is EMPTY for root and for pool
	// sessions, which have all permissions: check these flags first.
	IsLocalSuperuser bool     `xmlrpc:"is_local_superuser"`
	Pool             bool     `xmlrpc:"pool"`
	RBACPermissions  []string `xmlrpc:"rbac_permissions"` // lower case, "vbd.plug"
}

// Record returns the session's own record. If it cannot be decoded as a whole, Record reads
// its fields with one call each.
func (s *Session) Record(ctx context.Context) (SessionRecord, error) {
	r, err := get[SessionRecord](ctx, s, "session.get_record", string(*s.ref))
	if unreadable(err) {
		return s.recordByFields(ctx, err)
	}
	return r, err
}

// recordByFields is Record for a session whose record cannot be decoded. With an error the
// record is empty, because a part of it would have other permissions.
func (s *Session) recordByFields(ctx context.Context, cause error) (SessionRecord, error) {
	var r SessionRecord
	f := newFields(ctx, s, "session", string(*s.ref), cause)
	ask(f, &r.UUID, "uuid")
	ask(f, &r.IsLocalSuperuser, "is_local_superuser")
	ask(f, &r.Pool, "pool")
	ask(f, &r.RBACPermissions, "rbac_permissions")
	if f.err != nil {
		return SessionRecord{}, f.err
	}
	return r, nil
}

// Logout ends the session. The error of a second Logout is SessionInvalid.
func (s *Session) Logout(ctx context.Context) error {
	_, err := call[string](ctx, s, s.c.cfg.CallTimeout, "session.logout")
	return err
}

// call makes a call whose first parameter is the session.
func call[T any](ctx context.Context, s *Session, timeout time.Duration, method string, args ...any) (T, error) {
	ref := string(*s.ref)
	return invoke[T](ctx, s.c, request{
		method: method, secret: ref, timeout: timeout, params: append([]any{ref}, args...),
	})
}

// get makes a call that changes nothing.
func get[T any](ctx context.Context, s *Session, method string, args ...any) (T, error) {
	return call[T](ctx, s, s.c.cfg.CallTimeout, method, args...)
}

// mutate makes a call without a result that changes something.
func mutate(ctx context.Context, s *Session, method string, args ...any) error {
	_, err := call[string](ctx, s, s.c.cfg.MutateTimeout, method, args...)
	return err
}

// getText makes a getter call for a ref or a uuid.
func getText[T ~string](ctx context.Context, s *Session, method string, args ...any) (T, error) {
	text, err := get[T](ctx, s, method, args...)
	return nonEmpty(method, text, err)
}

var errEmpty error = &answerError{errors.New("empty result")}

// nonEmpty returns an error for an empty ref or uuid, with which later calls would fail in
// less obvious ways.
func nonEmpty[T ~string](method string, text T, err error) (T, error) {
	if err == nil && text == "" {
		err = &TransportError{Method: method, Sent: true, Err: errEmpty}
	}
	return text, err
}
