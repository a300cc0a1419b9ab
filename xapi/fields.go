package xapi

import (
	"context"
	"errors"

	"xapi-nbd/xapi/internal/xmlrpc"
)

// Records hold maps that anybody may write to, such as other_config, and xapi does
// not escape the keys of maps. The decoder reads what can be read; a key that looks
// like the end of its map cannot. Then the fields that are needed are asked for one
// by one, and the records of a list one by one, so that a record spoils nothing but
// itself.

// fields asks for single fields of one object, up to the first error.
type fields struct {
	ctx        context.Context
	s          *Session
	class, ref string
	err        error
}

// unreadable reports whether xapi executed a call and its answer cannot be read.
func unreadable(err error) bool {
	return errors.Is(err, xmlrpc.ErrMalformed) || errors.Is(err, errTooLong)
}

// newFields returns the fields of the object ref. cause is the error of the question
// for the whole record.
func newFields(ctx context.Context, s *Session, class, ref string, cause error) *fields {
	shown := ref
	if ref == string(*s.ref) { // the calling session's own record
		shown = redacted
	}
	s.c.log.WarnContext(ctx, "a record of xapi cannot be read, asking for its fields one by one", "class", class, "ref", shown, "err", cause)
	return &fields{ctx: ctx, s: s, class: class, ref: ref}
}

// ask stores the field called name, unless there was an error before.
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

// eachRecord asks for the records of a list one by one. Those of objects that have
// gone meanwhile are left out.
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
		case errors.Is(err, HandleInvalid) && !sessionEnded(err):
		default:
			return nil, err
		}
	}
	return all, nil
}

// records gives the keys of a map of records their type, which the decoder
// cannot.
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
