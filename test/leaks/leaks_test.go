package leaks

import (
	"sync/atomic"
	"testing"
	"time"
)

func TestMain(m *testing.M) { Main(m) }

// slow are tests that leave a goroutine behind for longer than goleak waits.
type slow struct{ ended atomic.Bool }

func (s *slow) Run() int {
	end := make(chan struct{})
	go func() {
		<-end
		s.ended.Store(true)
	}()
	time.AfterFunc(time.Second, func() { close(end) })
	return 0
}

type failing struct{}

func (failing) Run() int { return 3 }

func TestWaitsForGoroutines(t *testing.T) {
	var s slow
	if code := (patient{&s}).Run(); code != 0 || !s.ended.Load() {
		t.Errorf("exit code %d, goroutine ended: %v", code, s.ended.Load())
	}
	if code := (patient{failing{}}).Run(); code != 3 {
		t.Errorf("failed tests: exit code %d, want theirs", code)
	}
}
