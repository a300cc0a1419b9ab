package blockdev

import (
	"slices"
	"sync"
)

// span is a range of a device.
type span struct {
	begin, end int64
	alone      bool // nothing else that overlaps may be in flight
}

func (s span) conflicts(t span) bool {
	return (s.alone || t.alone) && s.begin < t.end && t.begin < s.end
}

// spanLocks are the ranges that are being written. A write of a part of a block reads and
// writes the whole block, and so must be alone in it. Writes of whole blocks are not, even if
// they overlap: the protocol leaves the result to the client.
type spanLocks struct {
	mu       sync.Mutex
	released *sync.Cond // with mu; not a sync.RWMutex, so that tests with synctest can wait
	held     []span
}

func newSpanLocks() *spanLocks {
	l := &spanLocks{}
	l.released = sync.NewCond(&l.mu)
	return l
}

// lock waits until no span that conflicts with s is held, and holds s. unlock ends that.
func (l *spanLocks) lock(s span) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for slices.ContainsFunc(l.held, s.conflicts) {
		l.released.Wait()
	}
	l.held = append(l.held, s)
}

func (l *spanLocks) unlock(s span) {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := slices.Index(l.held, s)
	l.held = slices.Delete(l.held, i, i+1)
	l.released.Broadcast()
}
