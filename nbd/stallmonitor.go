package nbd

import (
	"sync"
	"sync/atomic"
	"time"
)

const (
	// stallTime is the time between two looks of the monitor. A reader that is blocked in
	// the same call at two looks has stalled: reads from memory are faster, most reads
	// from storage slower.
	stallTime = time.Millisecond
	// idleLooks is after how many looks in a row without any request the monitor stops.
	idleLooks = 20
)

// stallMonitor starts another reader of requests when the one of a connection has
// been blocked for longer than stallTime. There is one for each server. It runs
// only while there are requests.
type stallMonitor struct {
	active atomic.Bool // a call that may block has begun since the last look

	mu            sync.Mutex // guards the fields below
	transmissions map[*transmission]struct{}
	stop          chan struct{} // closed to stop the running monitor; nil while none runs
}

func (m *stallMonitor) add(t *transmission) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.transmissions == nil {
		m.transmissions = make(map[*transmission]struct{})
	}
	m.transmissions[t] = struct{}{}
}

// remove removes t, and reports whether t was the last one. After it has returned the
// monitor starts no reader of t.
func (m *stallMonitor) remove(t *transmission) (last bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.transmissions, t)
	if len(m.transmissions) > 0 {
		return false
	}
	m.halt()
	return true
}

// wake starts the monitor unless it runs.
func (m *stallMonitor) wake() {
	if m.active.Load() {
		return
	}
	m.active.Store(true)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stop == nil {
		m.stop = make(chan struct{})
		go m.run(m.stop)
	}
}

// halt stops the monitor; m.mu is held.
func (m *stallMonitor) halt() {
	if m.stop != nil {
		close(m.stop)
		m.stop = nil
		m.active.Store(false) // so that the next request starts it again
	}
}

func (m *stallMonitor) run(stop <-chan struct{}) {
	tick := time.NewTicker(stallTime)
	defer tick.Stop()
	idle := 0
	for {
		select {
		case <-tick.C:
			idle = m.look(stop, idle)
		case <-stop:
			return
		}
	}
}

// look starts another reader for each connection whose reader is in the same call
// as at the last look. idle is how many looks in a row found no request; look
// returns the new number, and stops the monitor when it is large enough.
func (m *stallMonitor) look(stop <-chan struct{}, idle int) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stop == nil || (<-chan struct{})(m.stop) != stop {
		return 0 // this monitor has been stopped; another one may run
	}
	active := m.active.Swap(false)
	for t := range m.transmissions {
		n := t.token.blocked.Load()
		active = active || n != 0
		if n == 0 || n != t.token.seen {
			t.token.seen = n
			continue
		}
		if t.token.end(n) { // the token is taken, for the new reader
			if blockedIn(n&1) == inFetch {
				t.token.slow.Store(true)
			}
			go t.readRequestsFunc() // ends with the connection, or when it loses the token
		}
	}
	if active {
		return 0
	}
	if idle++; idle >= idleLooks {
		m.halt()
	}
	return idle
}
