package vdi

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/internal/fsys"
	"xapi-nbd/vdi/blockdev"
	"xapi-nbd/xapi"
)

// guarded is an attachment whose guard asks a fake xapi.
type guarded struct {
	*attachment
	begin time.Time
	ended chan struct{} // closed when keepGuarding has returned

	suspended atomic.Int64 // nanoseconds for which the host was suspended

	mu     sync.Mutex                  // guards answer
	answer func(context.Context) error // of xapi
}

// will changes the answer of xapi.
func (g *guarded) will(answer func(context.Context) error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.answer = answer
}

// ask is a check of the guard.
func (g *guarded) ask(ctx context.Context) error {
	g.mu.Lock()
	answer := g.answer
	g.mu.Unlock()
	return answer(ctx)
}

// newGuarded starts the guard of an attachment in use. It must be called in a bubble.
func newGuarded(t *testing.T, answer func(context.Context) error) *guarded {
	m := newManager(Config{Local: xapi.NewLocal(nil, "")}, fsys.OS{}, socketLocks{})
	g := &guarded{answer: answer, begin: time.Now(), ended: make(chan struct{})}
	m.bootTime = func() time.Duration { return time.Since(g.begin) + time.Duration(g.suspended.Load()) }
	g.attachment = newAttachment(m, request{vdi: "a", writer: "session"})
	g.stage = attached
	g.guard.confirm(m.bootTime())
	go func() {
		defer close(g.ended)
		g.keepGuarding(g.ask)
	}()
	t.Cleanup(func() {
		g.endLifetime(errUnused)
		<-g.ended
	})
	return g
}

// mayWrite reports whether a write may begin now.
func (g *guarded) mayWrite() bool {
	began := make(chan error, 1)
	ctx, cancel := context.WithCancel(g.lifetime)
	defer cancel()
	go func() { began <- g.guard.wait(ctx) }()
	synctest.Wait()
	select {
	case err := <-began:
		return err == nil
	default:
		return false
	}
}

var errAway = errors.New("xapi is away")

func answers(context.Context) error { return nil }

func refuses(context.Context) error { return errAway }

// hangs is an xapi that does not answer.
func hangs(ctx context.Context) error {
	<-ctx.Done()
	return context.Cause(ctx)
}

// Without an answer of xapi writes go on for a while, then wait, and go on when it answers.
func TestGuardOutage(t *testing.T) {
	for name, away := range map[string]func(context.Context) error{"refuses": refuses, "hangs": hangs} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGuarded(t, answers)
				time.Sleep(5*time.Second + guardEvery/2)
				g.will(away)
				last := time.Now().Add(-guardEvery / 2)
				time.Sleep(time.Until(last.Add(maxUnguarded - guardEvery/2)))
				if !g.mayWrite() {
					t.Errorf("%v after the last answer: writes wait", time.Since(last))
				}
				time.Sleep(time.Until(last.Add(maxUnguarded + guardEvery)))
				if g.mayWrite() {
					t.Errorf("%v after the last answer: writes go on", time.Since(last))
				}
				waited := make(chan error)
				go func() { waited <- g.guard.wait(g.lifetime) }()
				time.Sleep(time.Until(last.Add(maxPaused - 2*maxUnguarded)))
				select {
				case err := <-waited:
					t.Errorf("a write has begun, or failed, during the outage: %v", err)
				default:
				}
				g.will(answers)
				if err := <-waited; err != nil {
					t.Errorf("when xapi answers again: %v", err)
				}
				if !g.mayWrite() {
					t.Error("when xapi answers again: writes wait")
				}
			})
		})
	}
}

// After two minutes without an answer of xapi the attachment ends.
func TestGuardGivesUp(t *testing.T) {
	for name, away := range map[string]func(context.Context) error{"refuses": refuses, "hangs": hangs} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGuarded(t, away)
				<-g.ended
				if took := time.Since(g.begin); took < maxPaused || took > maxPaused+guardEvery {
					t.Errorf("gave up after %v, want %v", took, maxPaused)
				}
				var broken *ExclusiveError
				if err := context.Cause(g.lifetime); !errors.As(err, &broken) || broken.Rule != ruleUnknown {
					t.Errorf("the lifetime ended with %v, want rule unknown", err)
				}
			})
		})
	}
}

// The host is suspended: the write that comes first afterwards waits for a check, although
// none has failed. The check may take its whole time, and nothing ends.
func TestGuardAfterSuspend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGuarded(t, answers)
		time.Sleep(5*time.Second + guardEvery/2)
		g.suspended.Add(int64(5 * maxPaused))
		if g.mayWrite() {
			t.Error("a write has begun before xapi was asked")
		}
		g.will(func(ctx context.Context) error {
			time.Sleep(maxUnguarded - time.Second)
			return ctx.Err()
		})
		time.Sleep(guardEvery)
		if g.mayWrite() {
			t.Error("a write has begun while xapi was asked")
		}
		time.Sleep(maxUnguarded - time.Second)
		if !g.mayWrite() {
			t.Error("after a check: writes wait, or the attachment has ended")
		}
	})
}

// After the host was suspended xapi may need a while: the attachment does not end at once.
func TestGuardOutageAfterSuspend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGuarded(t, refuses)
		g.suspended.Add(int64(5 * maxPaused))
		time.Sleep(maxPaused - time.Second)
		g.will(answers)
		time.Sleep(2 * guardEvery)
		if !g.mayWrite() {
			t.Error("when xapi answers again: writes wait, or the attachment has ended")
		}
	})
}

// The process is stopped during a check, which succeeds afterwards: its answer is too old, and
// the next check has time of its own.
func TestGuardStoppedDuringACheck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGuarded(t, answers)
		time.Sleep(5*time.Second + guardEvery/2)
		stopped := 6 * maxUnguarded
		g.will(func(context.Context) error {
			time.Sleep(stopped)
			g.will(func(ctx context.Context) error {
				time.Sleep(maxUnguarded - time.Second)
				return ctx.Err()
			})
			return nil
		})
		time.Sleep(stopped + guardEvery)
		if g.mayWrite() {
			t.Error("a write has begun after a check that is older than the limit")
		}
		time.Sleep(maxUnguarded - time.Second)
		if !g.mayWrite() {
			t.Error("after the next check: writes wait, or the attachment has ended")
		}
	})
}

// A restart of xapi ends nothing.
func TestGuardRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGuarded(t, answers)
		for range 5 {
			g.will(refuses)
			time.Sleep(time.Minute)
			g.will(answers)
			time.Sleep(2 * guardEvery)
			if !g.mayWrite() {
				t.Fatal("after a restart: writes wait, or the attachment has ended")
			}
		}
	})
}

// A broken rule ends the attachment at the next check.
func TestGuardBroken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGuarded(t, answers)
		time.Sleep(10 * guardEvery)
		seen := &ExclusiveError{ruleAttached, "VBD of a VM"}
		g.will(func(context.Context) error { return seen })
		changed := time.Now()
		<-g.ended
		if took := time.Since(changed); took > guardEvery {
			t.Errorf("ended after %v, want at most %v", took, guardEvery)
		}
		if err := context.Cause(g.lifetime); !errors.Is(err, seen) || g.stage != lost {
			t.Errorf("got %v in stage %v, want what was seen", err, g.stage)
		}
	})
}

// A long range is changed piece by piece, and no further piece begins once a rule is broken.
func TestLongChangesAskTheGuard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGuarded(t, answers)
		g.dev = &blockdev.Device{}
		d := &WritableDisk{Disk: &Disk{a: g.attachment, size: 100 << 20, life: g.lifetime}}
		seen := &ExclusiveError{ruleAttached, "VBD of a VM"}
		var done [][2]int64
		zero := func(breakAfter int) func(off, n int64) error {
			return func(off, n int64) error {
				return d.change(off, n, func() error {
					if done = append(done, [2]int64{off, n}); len(done) == breakAfter {
						g.endLifetime(seen)
					}
					return nil
				})
			}
		}
		if err := d.inPieces(90<<20, 10<<20+1, zero(0)); !errors.Is(err, errRange) || done != nil {
			t.Errorf("outside the VDI: got %v, and the pieces %v", err, done)
		}
		if err := d.inPieces(5, maxChange+7, zero(0)); err != nil {
			t.Error(err)
		}
		if want := [][2]int64{{5, maxChange}, {5 + maxChange, 7}}; !slices.Equal(done, want) {
			t.Errorf("got the pieces %v, want %v", done, want)
		}
		done = nil
		if err := d.inPieces(0, 4*maxChange, zero(2)); !errors.Is(err, seen) || len(done) != 2 {
			t.Errorf("a rule broken in the second piece: got %v and %d pieces", err, len(done))
		}
	})
}
