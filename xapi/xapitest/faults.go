package xapitest

import (
	"errors"
	"sync"
	"time"
)

// errDropped makes the server close the connection without an answer.
var errDropped = errors.New("xapitest: connection dropped")

// faults are the injected faults. Host.mu guards them.
type faults struct {
	next    map[string][]*failure
	always  map[string]*failure
	delay   map[string]time.Duration
	lose    map[string]int
	drop    map[string]int
	crash   map[string]int
	gates   map[string][]chan struct{} // closed on release; not cleared by ClearFaults
	work    map[string]*workGate       // by operation; not cleared by ClearFaults
	booting bool
	// changedBlocks are the next answers of VDI.list_changed_blocks.
	changedBlocks []string
}

func newFaults() faults {
	return faults{
		next:   map[string][]*failure{},
		always: map[string]*failure{},
		delay:  map[string]time.Duration{},
		lose:   map[string]int{},
		drop:   map[string]int{},
		crash:  map[string]int{},
		gates:  map[string][]chan struct{}{},
		work:   map[string]*workGate{},
	}
}

// Fail makes the next valid call of method fail with an API error instead of being executed.
// Several failures apply to successive calls in order. A call that xapi refuses anyway, for
// its form, session or role, consumes none.
func (h *Host) Fail(method, code string, params ...string) {
	h.inject(func(f *faults) { f.next[method] = append(f.next[method], &failure{code, params}) })
}

// FailAlways makes every valid call of method fail until ClearFaults, after the failures of
// Fail.
func (h *Host) FailAlways(method, code string, params ...string) {
	h.inject(func(f *faults) { f.always[method] = &failure{code, params} })
}

// Delay makes every valid call of method wait for d before it is executed,
// until ClearFaults.
func (h *Host) Delay(method string, d time.Duration) {
	h.inject(func(f *faults) { f.delay[method] = d })
}

// LoseReply executes the next call of method and then closes the connection instead of
// answering, whether the call succeeded or failed.
func (h *Host) LoseReply(method string) {
	h.inject(func(f *faults) { f.lose[method]++ })
}

// DropConnection closes the connection of the next call of method without executing the
// call.
func (h *Host) DropConnection(method string) {
	h.inject(func(f *faults) { f.drop[method]++ })
}

// FailHTTP makes the next call of method end with HTTP status 500 instead of being
// executed, as when a pool supporter cannot reach its master.
func (h *Host) FailHTTP(method string) {
	h.inject(func(f *faults) { f.crash[method]++ })
}

// Booting makes every call, login included, fail with HOST_STILL_BOOTING.
func (h *Host) Booting(on bool) {
	h.inject(func(f *faults) { f.booting = on })
}

// ClearFaults removes the faults of Fail, FailAlways, Delay, LoseReply, DropConnection and
// FailHTTP. It neither releases Block nor ends Booting.
func (h *Host) ClearFaults() {
	h.inject(func(f *faults) {
		gates, work, booting := f.gates, f.work, f.booting
		*f = newFaults()
		f.gates, f.work, f.booting = gates, work, booting
	})
}

// Block makes valid calls of method wait before they are executed, until release is called.
// Then they continue even if their connection broke meanwhile. After two Blocks both have to
// be released.
func (h *Host) Block(method string) (release func()) {
	gate := make(chan struct{})
	h.inject(func(f *faults) { f.gates[method] = append(f.gates[method], gate) })
	return sync.OnceFunc(func() {
		h.inject(func(f *faults) {
			for i, g := range f.gates[method] {
				if g == gate {
					f.gates[method] = append(f.gates[method][:i:i], f.gates[method][i+1:]...)
					break
				}
			}
		})
		close(gate)
	})
}

// workGate blocks the storage work of one operation.
type workGate struct{ reached, open chan struct{} }

// BlockWork blocks the storage work of the next operation, "plug" or "unplug", or "attach" of
// a VM that is started, until release
// is called. By then the operation is in the records of its VBD and VDI. reached is closed
// when the operation waits. It continues after release even if the call's connection broke
// meanwhile.
func (h *Host) BlockWork(operation string) (reached <-chan struct{}, release func()) {
	gate := &workGate{make(chan struct{}), make(chan struct{})}
	h.inject(func(f *faults) { f.work[operation] = gate })
	return gate.reached, sync.OnceFunc(func() { close(gate.open) })
}

// waitForWork waits for the release of BlockWork. h.mu is held, and unlocked while it waits.
func (h *Host) waitForWork(operation string) {
	gate := h.faults.work[operation]
	if gate == nil {
		return
	}
	delete(h.faults.work, operation)
	close(gate.reached)
	h.mu.Unlock()
	defer h.mu.Lock()
	select {
	case <-gate.open:
	case <-h.ctx.Done():
	}
}

func (h *Host) inject(change func(*faults)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	change(&h.faults)
}

func takeOne(counts map[string]int, method string) bool {
	if counts[method] == 0 {
		return false
	}
	counts[method]--
	return true
}

// hold waits for Delay and Block, and returns the injected failure, if any. The error
// errDropped means that the host is closing.
func (h *Host) hold(method string) error {
	h.mu.Lock()
	delay := h.faults.delay[method]
	gates := h.faults.gates[method]
	h.mu.Unlock()
	if delay > 0 {
		timer := time.NewTimer(delay)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-h.ctx.Done():
			return errDropped
		}
	}
	for _, gate := range gates {
		select {
		case <-gate:
		case <-h.ctx.Done():
			return errDropped
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if queue := h.faults.next[method]; len(queue) > 0 {
		h.faults.next[method] = queue[1:]
		return queue[0]
	}
	if f := h.faults.always[method]; f != nil {
		return f
	}
	return nil
}
