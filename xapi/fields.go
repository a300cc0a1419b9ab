package xapi

import (
	"context"
	"errors"
	"sync"
	"time"

	"xapi-nbd/xapi/internal/xmlrpc"
)

// Records contain maps that every client may write to, such as other_config, and xapi does
// not escape the keys of maps. The decoder repairs most keys, but not one that looks like
// the end of its map. Then the client reads the needed fields with one call each, and the
// records of a list with one call each, so that an unreadable record affects only itself.

// fields reads single fields of one object, up to the first error.
type fields struct {
	ctx        context.Context
	s          *Session
	class, ref string
	err        error
}

// unreadable reports whether xapi executed the call but its answer cannot be decoded.
func unreadable(err error) bool {
	return errors.Is(err, xmlrpc.ErrMalformed) || errors.Is(err, errTooLong)
}

// newFields returns the fields of the object ref. cause is the error of the call for the
// whole record.
func newFields(ctx context.Context, s *Session, class, ref string, cause error) *fields {
	shown := ref
	if ref == string(*s.ref) { // the calling session's own record
		shown = redacted
	}
	if s.c.unreadable.mayLog(class, shown) {
		s.c.log.WarnContext(ctx, "a record of xapi cannot be read, asking for its fields one by one", "class", class, "ref", shown, "err", cause)
	}
	return &fields{ctx: ctx, s: s, class: class, ref: ref}
}

// unreadableLog limits the warnings about unreadable records. Some records are polled
// several times a second. The zero value is ready for use. It is safe for concurrent use.
type unreadableLog struct {
	mu   sync.Mutex
	last map[[2]string]time.Time // when an object was logged, by class and ref
}

// An object is logged once in unreadablePause. maxUnreadable bounds the memory for that; if
// more objects are unreadable, they are logged more often.
const (
	unreadablePause = time.Minute
	maxUnreadable   = 1024
)

// mayLog reports whether the object is to be logged now, and if so, stores the time.
func (l *unreadableLog) mayLog(class, ref string) bool {
	key, now := [2]string{class, ref}, time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	if last, ok := l.last[key]; ok && now.Sub(last) < unreadablePause {
		return false
	}
	if l.last == nil || len(l.last) >= maxUnreadable {
		l.last = make(map[[2]string]time.Time)
	}
	l.last[key] = now
	return true
}

// ask reads the field called name into the result, unless there was an error before.
func ask[T any](f *fields, to *T, name string) {
	if f.err != nil {
		return
	}
	value, err := get[T](f.ctx, f.s, f.class+".get_"+name, f.ref)
	if err != nil {
		f.err = err
		return
	}
	*to = value
}

// eachRecord reads the records of a list with one call each. It leaves out objects that have
// been destroyed meanwhile.
func eachRecord[K ~string, V any](ctx context.Context, record func(context.Context, K) (V, error), list func() ([]K, error)) (map[K]V, error) {
	refs, err := list()
	if err != nil {
		return nil, err
	}
	all := make(map[K]V, len(refs))
	for _, ref := range refs {
		r, err := record(ctx, ref)
		switch {
		case err == nil:
			all[ref] = r
		case errors.Is(err, HandleInvalid) && !SessionEnded(err):
		default:
			return nil, err
		}
	}
	return all, nil
}

// records converts the keys of a map of records to their type, which the decoder cannot do.
func records[K ~string, V any](in map[string]V, err error) (map[K]V, error) {
	if err != nil {
		return nil, err
	}
	out := make(map[K]V, len(in))
	for ref, record := range in {
		out[K(ref)] = record
	}
	return out, nil
}
