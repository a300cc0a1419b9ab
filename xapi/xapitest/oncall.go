package xapitest

// CallPoint is a moment in the life of a call that reached the host.
type CallPoint struct {
	N      int // of the call: how many had arrived since OnCall, from 1
	Method string
	After  bool // it was executed, but not answered yet
}

// Verdict decides what becomes of a call.
type Verdict int

const (
	// Proceed lets the call go on.
	Proceed Verdict = iota
	// Drop closes the connection: before the call without executing it, after
	// the call without answering.
	Drop
)

// callHook is what OnCall was given. Host.mu guards arrived.
type callHook struct {
	f       func(CallPoint) Verdict
	arrived int
}

// OnCall makes the host ask f about every call that arrives from now on, twice:
// before it is executed, and once it was, with or without success, before the
// answer is sent. nil removes f, but for calls that arrived already.
//
// f is called without the host's lock, on the call's own goroutine and so
// concurrently for concurrent calls. It may take its time and call every method
// of Host but Close, which would wait for it.
//
// Before comes ahead of all faults, which apply to a call that proceeds: what f
// injects there meets this very call. A call that has no answer, because of
// DropConnection or because a Restart or Close ended it, has no After. LoseReply
// drops the connection whatever the verdict.
func (h *Host) OnCall(f func(c CallPoint) Verdict) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.onCall = nil
	if f != nil {
		h.onCall = &callHook{f: f}
	}
}

// callPoint counts an arriving call and returns how to ask about it, or nil if
// nobody wants to be asked. h.mu is held, but must not be when asking.
func (h *Host) callPoint(method string) func(after bool) Verdict {
	hook := h.onCall
	if hook == nil {
		return nil
	}
	hook.arrived++
	n := hook.arrived
	return func(after bool) Verdict { return hook.f(CallPoint{N: n, Method: method, After: after}) }
}
