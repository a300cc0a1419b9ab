package service

import (
	"errors"
	"sync"
	"time"

	"xapi-nbd/cmd/xapi-nbd/internal/control"
	"xapi-nbd/cmd/xapi-nbd/internal/text"
	"xapi-nbd/xapi"
)

// health records how the calls to xapi ended.
type health struct {
	observe func(method string, took time.Duration, result string) // called for each call, for the metrics; may be nil

	// back, if not nil, is called when xapi answers again after it could not be
	// connected to. A connection that broke does not count: a call that breaks its
	// connection each time would be repeated without a pause.
	back func()

	mu       sync.Mutex // guards the fields below
	away     bool       // xapi could not be connected to, and has not answered since
	answered time.Time  // when xapi answered last; zero: never
	failed   time.Time  // when a call last got no answer, or an unusable one
	err      string     // the error of that call
}

// The results of a call.
const (
	callOK      = "ok"
	callError   = "error"       // xapi answered with an error
	callAnswer  = "unusable"    // the answer could not be parsed
	callFailure = "unreachable" // no answer
)

// called is the Observe function of the xapi.Config.
func (h *health) called(method string, took time.Duration, err error) {
	at := time.Now() // before the lock, so that the call that ended last counts
	result := callOK
	var refused *xapi.Error
	switch {
	case errors.As(err, &refused):
		result = callError
	case errors.Is(err, xapi.ErrAnswer):
		result = callAnswer
	case err != nil:
		result = callFailure
	}
	if h.observe != nil {
		h.observe(method, took, result)
	}
	if h.note(at, result, err) && h.back != nil {
		h.back()
	}
}

// note records the result of a call, and reports whether xapi answers again after it could
// not be connected to.
func (h *health) note(at time.Time, result string, err error) (back bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var lost *xapi.TransportError
	switch {
	case result != callFailure:
		back, h.away = h.away, false
	case errors.As(err, &lost) && !lost.Sent:
		h.away = true
	}
	if result != callFailure && at.After(h.answered) {
		h.answered = at
	}
	if (result == callFailure || result == callAnswer) && at.After(h.failed) {
		h.failed, h.err = at, err.Error()
	}
	return back
}

func (h *health) report() control.XapiReport {
	h.mu.Lock()
	defer h.mu.Unlock()
	var r control.XapiReport
	if !h.answered.IsZero() {
		at := h.answered
		r.LastAnswer = &at
	}
	if !h.failed.IsZero() {
		at := h.failed
		r.LastFailed, r.LastError = &at, text.OneLine(h.err)
	}
	r.Reachable = !h.answered.IsZero() && !h.answered.Before(h.failed)
	return r
}

// quietFor returns the time since the last call to xapi ended.
func (h *health) quietFor() time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	last := h.answered
	if h.failed.After(last) {
		last = h.failed
	}
	return time.Since(last)
}
