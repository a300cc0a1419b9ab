package xapitest

// CallPoint is a point in the execution of a call.
type CallPoint struct {
	N      int // of the call: how many had arrived since OnCall, from 1
	Method string
	After  bool // it was executed, but not answered yet
}

// Verdict is the decision of an OnCall function about a call.
type Verdict int

const (
	// Proceed continues the call.
	Proceed Verdict = iota
	// Drop closes the connection: before the call without executing it, after
	// the call without answering.
	Drop
)

// callHook has the function of OnCall. Host.mu guards arrived.
type callHook struct {
	f       func(CallPoint) Verdict
	arrived int
}

// OnCall makes the host call f twice for every call that arrives from now on: before it is
// executed, and after its execution, with or without success, before the answer is sent. nil
// removes f, except for calls that have already arrived.
//
// f is called without the host's lock, on the goroutine of the call, so concurrently for
// concurrent calls. It may block, and may call every method of Host except Close, which waits
// for it.
//
// The call before the execution precedes all faults: those that f injects there apply to this
// call. A call without an answer, because of DropConnection, Restart or Close, has no second
// call of f. LoseReply closes the connection whatever the verdict.
func (h *Host) OnCall(f func(c CallPoint) Verdict) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.onCall = nil
	if f != nil {
		h.onCall = &callHook{f: f}
	}
}

// callPoint counts an arriving call and returns the function to call at its points, or nil
// without OnCall. h.mu is held, but must not be held during that function.
func (h *Host) callPoint(method string) func(after bool) Verdict {
	hook := h.onCall
	if hook == nil {
		return nil
	}
	hook.arrived++
	n := hook.arrived
	return func(after bool) Verdict { return hook.f(CallPoint{N: n, Method: method, After: after}) }
}
