package vdi

import (
	"testing"
	"time"

	"xapi-nbd/internal/fsys"
	"xapi-nbd/xapi"
)

// Clients wait for a leftover of their VDI. When the manager leaves it to another process, or is
// closed, nothing will happen to the leftover any more, so they look again.
func TestWaitersForALeftoverAreWoken(t *testing.T) {
	for name, end := range map[string]func(*Manager){"left to others": (*Manager).leaveToOthers, "closing": (*Manager).BeginClose} {
		m := newManager(Config{Local: xapi.NewLocal(nil, "")}, fsys.OS{}, socketLocks{})
		m.owner = newOwner(2)
		l := newLeftover(&removal{m: m, log: m.log, uuid: uuidA, vdi: "a"}, time.Now())
		l.stop = func() {}
		m.leftovers = append(m.leftovers, l)
		m.mu.Lock()
		next := m.mustWaitFor("a", true)
		slot := m.slotFree
		m.mu.Unlock()
		end(m)
		if !isClosed(next.wait) {
			t.Errorf("%s: those who wait for the leftover wait on", name)
		}
		if name == "closing" && !isClosed(slot) {
			t.Errorf("%s: those who wait for a slot wait on", name)
		}
	}
}

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}
