package flush

import (
	"errors"
	"testing"
	"testing/synctest"
)

// file is an open file whose flushes wait until the test lets them end.
type file struct {
	begun   int
	results chan error
}

func (f *file) sync() error {
	f.begun++
	return <-f.results
}

// call flushes in another goroutine, which sends the result.
func call(g *Group, f *file) <-chan error {
	ended := make(chan error, 1)
	go func() { ended <- g.Flush(f.sync) }()
	synctest.Wait()
	return ended
}

// wantRunning fails the test if one of the flushes has ended.
func wantRunning(t *testing.T, when string, flushes ...<-chan error) {
	t.Helper()
	synctest.Wait()
	for i, ended := range flushes {
		if len(ended) > 0 {
			t.Errorf("%s: flush %d has ended (%v)", when, i, <-ended)
		}
	}
}

// Calls during a flush wait for the next one, which they share.
func TestCallsShareTheNextFlush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, f := NewGroup(), &file{results: make(chan error)}
		first := call(g, f)
		second, third := call(g, f), call(g, f)
		wantRunning(t, "before the first flush has ended", first, second, third)
		f.results <- nil
		if err := <-first; err != nil {
			t.Error(err)
		}
		wantRunning(t, "after a flush that began before them", second, third)
		fourth := call(g, f)
		if f.begun != 2 {
			t.Errorf("%d flushes have begun, want 2", f.begun)
		}
		f.results <- nil
		if err := errors.Join(<-second, <-third); err != nil {
			t.Error(err)
		}
		wantRunning(t, "after a flush that began before it", fourth)
		f.results <- nil
		if err := <-fourth; err != nil || f.begun != 3 {
			t.Errorf("got %v after %d flushes, want no error after 3", err, f.begun)
		}
	})
}

// A flush that overlaps one that fails does not succeed, nor does any later one.
func TestAFailureIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, f := NewGroup(), &file{results: make(chan error)}
		lost := errors.New("changes were lost")
		flushes := []<-chan error{call(g, f), call(g, f)}
		f.results <- lost
		synctest.Wait()
		f.results <- nil
		flushes = append(flushes, call(g, f))
		f.results <- errors.New("another failure")
		for i, ended := range flushes {
			if err := <-ended; !errors.Is(err, lost) {
				t.Errorf("flush %d: got %v, want the first failure", i, err)
			}
		}
	})
}

// After a panic the next flush is made.
func TestAPanicEndsAFlush(t *testing.T) {
	g := NewGroup()
	func() {
		defer func() { _ = recover() }()
		_ = g.Flush(func() error { panic("driver") })
	}()
	made := false
	if err := g.Flush(func() error { made = true; return nil }); err != nil || !made {
		t.Errorf("got %v, made: %t", err, made)
	}
}
