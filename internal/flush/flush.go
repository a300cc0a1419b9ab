// Package flush makes the flushes of one open file for callers that may overlap.
package flush

import "sync"

// Group makes the flushes of one open file, one at a time. The kernel reports that changes were
// lost once for each open file: of two overlapping fsync(2) the first one can get the error, and
// the second one succeed although it had to cover the same changes.
type Group struct {
	mu           sync.Mutex // guards the fields below
	ended        *sync.Cond // with mu: the running flush has ended
	begun        int64      // number of flushes that have begun
	running      bool       // the last of them has not ended
	firstFailure error
}

// NewGroup returns the Group of a file that nothing else flushes.
func NewGroup() *Group {
	g := &Group{}
	g.ended = sync.NewCond(&g.mu)
	return g
}

// Flush returns when a flush has ended that began after the call of Flush. It makes it by calling
// do, or shares that of another caller: all calls during a flush share the next one. Once do has
// failed Flush always fails, with the error of the first failure. It may be called concurrently.
func (g *Group) Flush(do func() error) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	own := g.begun + 1 // one that is running may have begun too early
	for g.running && g.begun <= own {
		g.ended.Wait()
	}
	if g.begun < own {
		g.run(do)
	}
	return g.firstFailure
}

// run calls do; g.mu is held, except during the call.
func (g *Group) run(do func() error) {
	g.begun++
	g.running = true
	g.mu.Unlock()
	defer func() { // also if do panics
		g.mu.Lock()
		g.running = false
		g.ended.Broadcast()
	}()
	if err := do(); err != nil {
		g.fail(err)
	}
}

func (g *Group) fail(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.firstFailure == nil {
		g.firstFailure = err
	}
}
