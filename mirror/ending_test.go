package mirror

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// After a pivot clients use the secondary and not the primary, also those that were held.
func TestPivot(t *testing.T) {
	run(t, nil, func(t *testing.T, f *fixture) {
		f.wait()
		f.s.free = false
		completed := make(chan error, 1)
		go func() { completed <- f.Complete(t.Context(), Pivot, true) }()
		f.s.finish(f.only(f.s), nil) // the flush before changes are held
		held := f.write(0, 10, 'x')
		if f.answered(held) || f.Status().State != Completing {
			t.Error("the change is not held")
		}
		f.s.mu.Lock()
		f.s.free = true
		f.s.mu.Unlock()
		f.s.finish(f.only(f.s), nil)
		if err := <-completed; err != nil {
			t.Fatal(err)
		}
		if err := <-f.ran; err != nil {
			t.Errorf("Run: %v", err)
		}
		changes := f.p.changes
		f.p.dead = true
		if err := <-held; err != nil {
			t.Error(err)
		}
		got := make([]byte, 10)
		for _, err := range []error{f.Trim(t.Context(), 100, 10), f.WriteZeroes(t.Context(), 5, 5), f.Flush(t.Context()), f.ReadAt(t.Context(), got, 0)} {
			if err != nil {
				t.Error(err)
			}
		}
		if want := []byte("xxxxx\x00\x00\x00\x00\x00"); !bytes.Equal(got, want) || f.p.changes != changes {
			t.Errorf("read %q, want %q; %d changes of the primary after the pivot", got, want, f.p.changes-changes)
		}
		if s := f.Status(); s.State != Pivoted || !s.OnSecondary || s.Ready {
			t.Errorf("status: %+v", s)
		}
		if err := f.Cancel(); err == nil {
			t.Error("the mirror was cancelled after the pivot")
		}
	})
}

// Complete returns only after the last use of the primary has ended.
func TestPivotWaitsForReads(t *testing.T) {
	run(t, nil, func(t *testing.T, f *fixture) {
		f.wait()
		f.p.free = false
		read := make(chan error, 1)
		go func() { read <- f.ReadAt(t.Context(), make([]byte, 10), 0) }()
		o := f.only(f.p)
		f.p.mu.Lock()
		f.p.free = true
		f.p.mu.Unlock()
		completed := make(chan error, 1)
		go func() { completed <- f.Complete(t.Context(), Pivot, false) }()
		if f.answered(completed) || f.Status().State != Pivoted {
			t.Error("complete returned while the primary was read")
		}
		f.p.finish(o, nil)
		if err := <-completed; err != nil {
			t.Error(err)
		}
	})
}

func TestStopClients(t *testing.T) {
	run(t, nil, func(t *testing.T, f *fixture) {
		synctest.Wait()
		if err := f.Complete(t.Context(), StopClients, false); err != nil {
			t.Fatal(err)
		}
		for _, err := range []error{
			f.WriteAt(t.Context(), []byte("x"), 0), f.ReadAt(t.Context(), make([]byte, 1), 0),
			f.Trim(t.Context(), 0, 1), f.WriteZeroes(t.Context(), 0, 1), f.Flush(t.Context()),
		} {
			if !errors.Is(err, ErrStopped) || !errors.Is(err, syscall.ESHUTDOWN) {
				t.Errorf("%v, want ErrStopped", err)
			}
		}
		if !f.equal() {
			t.Error("the ends differ")
		}
	})
}

// A difference that nobody knows about is found, and copied.
func TestVerify(t *testing.T) {
	run(t, nil, func(t *testing.T, f *fixture) {
		f.wait()
		const at = 3<<20 + 17
		f.s.data[at]++
		var difference *DifferenceError
		err := f.Complete(t.Context(), Pivot, true)
		if !errors.As(err, &difference) || difference.Offset != at {
			t.Fatalf("%v, want a difference at %d", err, at)
		}
		if !f.answered(f.write(0, 10, 'x')) {
			t.Error("changes are held after Complete has failed")
		}
		if err := f.Complete(t.Context(), Pivot, true); err != nil {
			t.Error(err)
		}
	})
}

// Changes are held for 30 seconds at most, then the mirror goes on.
func TestMaxHold(t *testing.T) {
	run(t, nil, func(t *testing.T, f *fixture) {
		f.wait()
		f.s.free = false
		completed := make(chan error, 1)
		go func() { completed <- f.Complete(t.Context(), Pivot, false) }()
		f.s.finish(f.only(f.s), nil)
		began, held := time.Now(), f.write(0, 10, 'x')
		if err := <-completed; !errors.Is(err, ErrHold) || time.Since(began) != defaultMaxHold {
			t.Errorf("%v after %v, want ErrHold after %v", err, time.Since(began), defaultMaxHold)
		}
		time.Sleep(defaultStall)
		if !f.answered(held) || f.p.data[0] != 'x' {
			t.Error("the change that was held is not made")
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if err := f.Complete(ctx, Pivot, false); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("complete while the secondary is stuck: %v", err)
		}
	})
}

// A second controller, and one that goes away, do no harm.
func TestControllers(t *testing.T) {
	run(t, nil, func(t *testing.T, f *fixture) {
		f.wait()
		f.s.free = false
		ctx, leave := context.WithCancelCause(t.Context())
		completed := make(chan error, 1)
		go func() { completed <- f.Complete(ctx, Pivot, false) }()
		f.s.finish(f.only(f.s), nil)
		if err := f.Complete(t.Context(), Pivot, false); !errors.Is(err, ErrBusy) {
			t.Errorf("second complete: %v, want ErrBusy", err)
		}
		held, gone := f.write(0, 10, 'x'), errors.New("gone")
		leave(gone)
		if err := <-completed; !errors.Is(err, gone) {
			t.Errorf("complete: %v", err)
		}
		time.Sleep(defaultStall)
		if !f.answered(held) || f.Status().State.Ended() {
			t.Error("the mirror does not go on")
		}
		if err := f.Run(t.Context()); !errors.Is(err, ErrBusy) {
			t.Errorf("second Run: %v, want ErrBusy", err)
		}
	})
	m, err := New(Config{Primary: newSimDevice(t, "a", nil, 1, make([]byte, 1)), Secondary: newSimDevice(t, "b", nil, 1, make([]byte, 1))})
	if err != nil {
		t.Fatal(err)
	}
	given, giveUp := context.WithCancelCause(t.Context())
	giveUp(io.EOF)
	if err := m.Complete(given, Pivot, false); !errors.Is(err, io.EOF) {
		t.Errorf("complete before Run: %v, want that it waits until its context is done", err)
	}
}

// brokenDevice fails all changes.
type brokenDevice struct {
	*simDevice
	attempts atomic.Int64
}

func (d *brokenDevice) WriteAt(context.Context, []byte, int64) error {
	d.attempts.Add(1)
	return errInjected
}

// Copying is repeated for a minute, with growing pauses. Then the mirror ends, and clients
// go on, or their changes fail.
func TestOnError(t *testing.T) {
	for _, policy := range []OnError{Detach, Stop} {
		var broken *brokenDevice
		run(t, func(c *Config, f *fixture) {
			broken = &brokenDevice{simDevice: f.s}
			c.Secondary, c.OnError, c.Requests = broken, policy, 4
		}, func(t *testing.T, f *fixture) {
			began, want, state := time.Now(), ErrDetached, Detached
			if policy == Stop {
				want, state = ErrFailed, Failed
			}
			err := <-f.ran
			if !errors.Is(err, want) || !errors.Is(err, errInjected) || !strings.Contains(err.Error(), "writing the secondary") {
				t.Errorf("Run: %v, want %v", err, want)
			}
			if d := time.Since(began); d < defaultRetryFor || d > defaultRetryFor+maxPause {
				t.Errorf("given up after %v", d)
			}
			if n := broken.attempts.Load(); n < 20 || n > 60 {
				t.Errorf("%d attempts", n)
			}
			err = f.WriteAt(t.Context(), []byte("x"), 0)
			if policy == Detach && err != nil || policy == Stop && (!errors.Is(err, ErrFailed) || !errors.Is(err, syscall.EIO)) {
				t.Errorf("a change in state %v: %v", state, err)
			}
			if err := f.ReadAt(t.Context(), make([]byte, 1), 0); err != nil {
				t.Errorf("a read in state %v: %v", state, err)
			}
			if s := f.Status(); s.State != state || s.LastError == nil {
				t.Errorf("status: %+v", s)
			}
			for _, err := range []error{f.Wait(t.Context()), f.Complete(t.Context(), Pivot, false)} {
				if !errors.Is(err, want) {
					t.Errorf("%v, want %v", err, want)
				}
			}
		})
	}
}

// slowToCancel is a device whose operations take a second longer when they are cancelled.
type slowToCancel struct{ *simDevice }

func (d slowToCancel) WriteAt(ctx context.Context, p []byte, off int64) error {
	err := d.simDevice.WriteAt(ctx, p, off)
	if ctx.Err() != nil {
		time.Sleep(time.Second)
	}
	return err
}

// Run returns when nothing is done at the secondary any more, however the mirror ends.
func TestCancel(t *testing.T) {
	run(t, func(c *Config, f *fixture) {
		f.s.free = false
		c.Secondary = slowToCancel{f.s}
	}, func(t *testing.T, f *fixture) {
		synctest.Wait()
		began := time.Now()
		if err := f.Cancel(); err != nil {
			t.Fatal(err)
		}
		if err := <-f.ran; !errors.Is(err, ErrCancelled) || time.Since(began) != time.Second {
			t.Errorf("Run: %v after %v, want ErrCancelled after 1s", err, time.Since(began))
		}
		if !f.answered(f.write(0, 10, 'x')) || f.p.data[0] != 'x' {
			t.Error("a client does not go on on the primary")
		}
		if s := f.Status(); s.State != Cancelled || s.Ready {
			t.Errorf("status: %+v", s)
		}
	})
}

// brokenIntent fails as the test wants.
type brokenIntent struct{ mark, complete error }

func (l *brokenIntent) Mark(context.Context, int64, int64) error { return l.mark }
func (l *brokenIntent) Done(int64, int64)                        {}
func (l *brokenIntent) Clear(context.Context, time.Time, func(off, n int64) bool) error {
	return nil
}
func (l *brokenIntent) Complete(context.Context, bool) error { return l.complete }

// A change that cannot be marked is not made, and a mirror is not completed if that cannot be
// recorded.
func TestIntentErrors(t *testing.T) {
	log := &brokenIntent{mark: errInjected, complete: errInjected}
	run(t, func(c *Config, _ *fixture) { c.Intent = log }, func(t *testing.T, f *fixture) {
		f.wait()
		changes := f.p.changes
		if err := f.WriteAt(t.Context(), []byte("x"), 0); !errors.Is(err, errInjected) || f.p.changes != changes {
			t.Errorf("a change that is not in the log: %v; %d changes of the primary", err, f.p.changes-changes)
		}
		if err := f.Complete(t.Context(), Pivot, false); !errors.Is(err, errInjected) || f.Status().State.Ended() {
			t.Errorf("complete: %v, state %v", err, f.Status().State)
		}
		log.mark, log.complete = nil, nil
		if !f.answered(f.write(0, 10, 'x')) {
			t.Error("the mirror does not go on")
		}
		if err := f.Complete(t.Context(), Pivot, true); err != nil {
			t.Error(err)
		}
	})
}
