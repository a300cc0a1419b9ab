package nbd

import (
	"errors"
	"fmt"
	"runtime/debug"
)

// panicError is a panic in an Exporter, a TLSPolicy or a Device. The request or the
// connection that called it fails, but not the process, which serves other connections.
type panicError struct {
	value any
	stack []byte
}

// There is no Unwrap: the value of a panic must not select the error that a peer gets.
func (e *panicError) Error() string { return fmt.Sprintf("panic: %v", e.value) }

// recoverTo sets *err to a panicError if there is a panic. It must be deferred directly.
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

// stackOf returns the attributes of a log line for the stack of a panic, none for other
// errors.
func stackOf(err error) []any {
	var p *panicError
	if !errors.As(err, &p) {
		return nil
	}
	return []any{"stack", string(p.stack)}
}
