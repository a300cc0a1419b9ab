package xmlrpc

import (
	"errors"
	"fmt"

	kolo "github.com/kolo/xmlrpc"
)

// ErrMalformed is matched by the errors of Decode: the reply is not one of xapi's, even after
// the repair of its known faults, and must not be used.
var ErrMalformed = errors.New("malformed reply")

// The two values of Reply.Status.
const (
	Success = "Success"
	Failure = "Failure"
)

// Reply is the struct that xapi wraps around every result. On Success Value is
// set, on Failure ErrorDescription holds at least the error code.
type Reply[T any] struct {
	Status           string
	Value            T
	ErrorDescription []string
}

// Decode reads a methodResponse document. T is built of strings of any string
// type, bools, slices, maps with plain string keys (a named key type makes kolo
// panic) and structs with xmlrpc tags. Integers are strings on xapi's wire: use
// a string and parse it. Unknown members are ignored, absent ones leave the zero
// value. All errors match ErrMalformed; their texts repeat nothing of the reply, which
// may hold a session ref.
func Decode[T any](body []byte) (reply Reply[T], err error) {
	// xapi does not escape map keys, so every client that may write an other_config controls
	// parts of this document. A panic of kolo's reflection code is an error, and does not end
	// the service.
	defer func() {
		if p := recover(); p != nil {
			reply, err = Reply[T]{}, fmt.Errorf("%w: decoder panic: %v", ErrMalformed, p)
		}
	}()
	plain, err := normalise(body)
	if err != nil {
		return Reply[T]{}, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	// A new value for each call: kolo does not change it for empty values and cannot write
	// into slices that have a length.
	var fresh Reply[T]
	if err := kolo.Response(plain).Unmarshal(&fresh); err != nil {
		return Reply[T]{}, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	switch {
	case fresh.Status == Success:
	case fresh.Status == Failure && len(fresh.ErrorDescription) > 0 && fresh.ErrorDescription[0] != "":
	case fresh.Status == Failure:
		return Reply[T]{}, fmt.Errorf("%w: failure without an error code", ErrMalformed)
	default:
		return Reply[T]{}, fmt.Errorf("%w: no status", ErrMalformed)
	}
	return fresh, nil
}
