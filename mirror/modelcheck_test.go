package mirror

import (
	"bytes"
	"errors"
	"fmt"
	"testing/synctest"
)

// fail reports a violation with the steps that led to it.
func (r *modelRun) fail(format string, args ...any) {
	r.t.Helper()
	for _, line := range r.trace {
		r.t.Log(line)
	}
	r.t.Errorf("step %d: %s", r.steps, fmt.Sprintf(format, args...))
	r.kill(false) // so that all goroutines end
	r.t.FailNow()
}

// check checks everything that must be true at each moment.
func (r *modelRun) check(when string) {
	r.t.Helper()
	if r.rng.IntN(4) == 0 { // not always: it notices losses
		r.checkStatus()
		synctest.Wait() // that may have let the mirror go on
	}
	if err := violation(r.m, r.ends); err != nil {
		r.fail("%s %v", when, err)
	}
	r.checkIntent()
	state := r.m.state
	switch {
	case state.Ended() && !r.ended:
		r.ended = true
		r.seen[state.String()]++
		r.note("%v", state)
		r.untouched = r.ends[primary].changes
		if state == Pivoted || state == Stopped {
			r.checkEnd()
		}
	case state == Pivoted && r.ends[primary].changes != r.untouched:
		r.fail("the primary was changed after the pivot")
	case state == Copying && len(r.m.t.ops) > 0 && r.m.t.count[toBoth] > 0:
		r.seen["changes at both ends"]++
	}
	if r.completing != nil {
		select {
		case err := <-r.completing:
			r.completed(err)
		default:
		}
	}
	data := r.serving().data
	for i, known := range r.known {
		if known && data[i] != r.expected[i] {
			r.fail("%s the byte at %d that a client has written is not there", when, i)
		}
	}
}

// checkIntent: where the bit of the log is not set, a crash at this moment leaves both ends
// equal, whatever they have put on stable storage.
func (r *modelRun) checkIntent() {
	l := r.intent
	if l == nil || l.ended {
		return
	}
	p, s := r.ends[primary], r.ends[secondary]
	for i, set := range l.disk.data {
		begin := int64(i) * l.region
		end := min(begin+l.region, modelSize)
		want := p.data[begin:end]
		if set != 0 {
			continue
		}
		r.seen["clear bits"]++
		for _, got := range [][]byte{p.durable, s.data, s.durable} {
			if !bytes.Equal(want, got[begin:end]) {
				r.fail("the bit of region %d is not set, and the ends may differ after a crash", i)
			}
		}
	}
}

func (r *modelRun) completed(err error) {
	r.completing = nil
	r.note("complete: %v", err)
	var difference *DifferenceError
	switch {
	case errors.As(err, &difference):
		r.fail("%v", err)
	case err == nil && (r.m.state != Pivoted && r.m.state != Stopped || len(r.ends[primary].pending) > 0):
		r.fail("complete returned in state %v, with the primary in use: %v", r.m.state, r.ends[primary].pending)
	}
}

// checkEnd is called when the mirror has just ended with success.
func (r *modelRun) checkEnd() {
	p, s := r.ends[primary], r.ends[secondary]
	if !bytes.Equal(p.data, s.data) || !bytes.Equal(s.data, s.durable) || !bytes.Equal(p.data, p.durable) {
		r.fail("completed although the ends differ or are not flushed")
	}
	if r.intent != nil && !r.intent.ended {
		r.fail("completed, and the log has not been told")
	}
}

func (r *modelRun) checkStatus() {
	s := r.m.Status()
	p, q := r.ends[primary], r.ends[secondary]
	if s.State == InSync {
		r.seen["in sync"]++
		if !bytes.Equal(p.data, q.data) || !bytes.Equal(q.data, q.durable) {
			r.fail("in sync is said, although the ends differ or the secondary is not flushed")
		}
	}
	if s.Dirty < 0 || s.Dirty > modelSize || s.Dirty > 0 && s.State == InSync {
		r.fail("status: %+v", s)
	}
	if s.Stalls > 0 {
		r.seen["stalls"]++
	}
}

// violation returns an error for a granule of which the invariant is not true.
func violation(m *Mirror, ends [2]*simDevice) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state.Ended() {
		return nil
	}
	t := m.t
	for g := range t.granules {
		begin, end := g*t.granule, min((g+1)*t.granule, t.size)
		if bytes.Equal(ends[0].data[begin:end], ends[1].data[begin:end]) || t.dirty.has(g) || t.overlaps(begin, end) {
			continue
		}
		noticed := true
		for s, c := range t.caches {
			noticed = noticed && (c.losses == ends[s].Losses() || !c.unflushed.has(g) && !c.flushing.has(g))
		}
		if noticed {
			return fmt.Errorf("granule %d differs, and is neither dirty nor in flight", g)
		}
	}
	var changes []*simOp
	for _, o := range ends[secondary].pending {
		for _, other := range changes {
			if o.changes() && o.off < other.off+other.n && other.off < o.off+o.n {
				return fmt.Errorf("%v and %v are in flight at the same time", o, other)
			}
		}
		if o.changes() {
			changes = append(changes, o)
		}
	}
	return nil
}
