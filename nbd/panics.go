package nbd

import (
	"errors"
	"fmt"
	"runtime/debug"
)

// panicError is a panic in code that was given to the server: an Exporter, a TLS policy
// or a Device. It ends the request or the connection that called that code, and not the
// process, in which other connections transfer their data.
type panicError struct {
	value any
	stack []byte
}

// There is no Unwrap: the value of a panic is no answer for a peer.
func (e *panicError) Error() string { return fmt.Sprintf("panic: %v", e.value) }

// recoverTo turns a panic into an error. It must be deferred directly.
func recoverTo(err *error) {
	if value := recover(); value != nil {
		*err = &panicError{value, debug.Stack()}
	}
}

// guard calls f and returns its panic as an error.
func guard(f func()) (err error) {
	defer recoverTo(&err)
	f()
	return nil
}

// errorOf is guard for calls that return an error of their own.
func errorOf(f func() error) (err error) {
	if perr := guard(func() { err = f() }); perr != nil {
		return perr
	}
	return err
}

// stackOf returns the attributes by which a log line shows where a panic was, and none
// for any other error.
func stackOf(err error) []any {
	var p *panicError
	if !errors.As(err, &p) {
		return nil
	}
	return []any{"stack", string(p.stack)}
}
