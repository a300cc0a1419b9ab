package auth

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/xapi"
)

// asked is a check that waits in the queue, in a goroutine of its own.
type asked struct {
	ticket *ticket
	err    error
	done   atomic.Bool
	over   chan struct{} // closed after the other fields are set
}

func (q *queue) ask(t *testing.T, peer string, known bool) *asked {
	a := &asked{over: make(chan struct{})}
	go func() {
		a.ticket, a.err = q.wait(t.Context(), peer, known)
		a.done.Store(true)
		close(a.over)
	}()
	synctest.Wait()
	return a
}

func (a *asked) wantGranted(t *testing.T, name string) {
	t.Helper()
	synctest.Wait()
	if !a.done.Load() || a.err != nil {
		t.Fatalf("%s: got done %v, %v, want it granted", name, a.done.Load(), a.err)
	}
}

func (a *asked) wantWaiting(t *testing.T, name string) {
	t.Helper()
	synctest.Wait()
	if a.done.Load() {
		t.Fatalf("%s: got ticket %v, %v, want that it waits", name, a.ticket != nil, a.err)
	}
}

func (a *asked) wantRefused(t *testing.T, name string) {
	t.Helper()
	synctest.Wait()
	if !a.done.Load() || !errors.Is(a.err, ErrTooManyRejections) {
		t.Fatalf("%s: got done %v, %v, want ErrTooManyRejections", name, a.done.Load(), a.err)
	}
}

// wait waits until the check is granted or refused.
func (a *asked) wait() { <-a.over }

func (a *asked) end(o outcome) {
	a.ticket.end(o)
	synctest.Wait()
}

// reject lets n sessions of a peer be rejected.
func (q *queue) reject(t *testing.T, peer string, n int) {
	t.Helper()
	for i := range n {
		a := q.ask(t, peer, false)
		a.wantGranted(t, fmt.Sprintf("rejection %d", i+1))
		a.end(rejected)
	}
}

// TestQueueDelays: each rejection delays the next checks of that peer, and of no other.
func TestQueueDelays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var q queue
		q.reject(t, "stranger", freeRejections+1)
		for _, want := range []time.Duration{
			250 * time.Millisecond, 500 * time.Millisecond, time.Second, 2 * time.Second, 2 * time.Second,
		} {
			delayed := q.ask(t, "stranger", false)
			honest := q.ask(t, "honest", false)
			honest.wantGranted(t, "another peer")
			honest.end(accepted)
			known := q.ask(t, "stranger", true)
			known.wantGranted(t, "a session that was accepted before")
			known.end(unanswered)
			time.Sleep(want - 1)
			delayed.wantWaiting(t, "just before the end of the delay")
			time.Sleep(time.Nanosecond)
			delayed.wantGranted(t, "at its end")
			delayed.end(rejected)
		}
		time.Sleep(forgetPeer)
		q.reject(t, "stranger", freeRejections) // forgotten
		good := q.ask(t, "stranger", false)
		good.wantGranted(t, "")
		good.end(accepted)
		q.reject(t, "stranger", freeRejections) // expired
	})
}

// TestQueueValidBehindInvalid: a backup server whose sessions have all ended connects with a
// valid one, behind as many invalid ones as may wait; it is checked in time.
func TestQueueValidBehindInvalid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var q queue
		q.reject(t, "server", freeRejections+1)
		var old []*asked
		for range maxDelayed - 1 {
			old = append(old, q.ask(t, "server", false))
		}
		begin := time.Now()
		valid := q.ask(t, "server", false)
		q.ask(t, "server", false).wantRefused(t, "one more than may wait")
		for _, a := range old {
			a.wait()
			a.wantGranted(t, "an old session")
			a.end(rejected)
		}
		valid.wait()
		valid.wantGranted(t, "the valid session")
		if took := time.Since(begin); took > maxDelayed*lastPenalty {
			t.Errorf("it was checked after %v", took)
		}
		valid.end(accepted)
		next := q.ask(t, "server", false)
		next.wantGranted(t, "after an accepted session")
		next.end(unanswered)
	})
}

// TestQueueOrder: peers without rejections come first, those with the most come last.
func TestQueueOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var q queue
		q.reject(t, "twice", 2)
		q.reject(t, "once", 1)
		var asking []*asked
		for i := range maxChecks {
			a := q.ask(t, fmt.Sprint("busy", i), false)
			a.wantGranted(t, "room for all")
			asking = append(asking, a)
		}
		twice, once := q.ask(t, "twice", false), q.ask(t, "once", false)
		clean, again := q.ask(t, "clean", false), q.ask(t, "clean", false)
		other, known := q.ask(t, "other", false), q.ask(t, "twice", true)
		for i, next := range []*asked{known, clean, other, again, once, twice} {
			next.wantWaiting(t, "no room")
			asking[i].end(unanswered)
			next.wantGranted(t, fmt.Sprint("number ", i))
		}
	})
}

func TestQueueLimitsPerPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var q queue
		var asking []*asked
		for range maxPerPeer {
			a := q.ask(t, "peer", false)
			a.wantGranted(t, "below the limit")
			asking = append(asking, a)
		}
		next := q.ask(t, "peer", false)
		next.wantWaiting(t, "at the limit")
		q.ask(t, "peer", true).wantGranted(t, "a session that was accepted before")
		q.ask(t, "other", false).wantGranted(t, "another peer")
		asking[0].end(unanswered)
		next.wantWaiting(t, "the known one counts")
		asking[1].end(unanswered)
		next.wantGranted(t, "below the limit again")
	})
}

// TestQueueLimitsRejected: the checks of peers with rejections are limited, both those in
// progress and those that wait; beyond the limit those with the most rejections are refused.
func TestQueueLimitsRejected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var q queue
		name := func(i int) string { return fmt.Sprint("stranger", i) }
		for i := range maxOfRejected + maxWaitingRejected {
			q.reject(t, name(i), 2)
		}
		q.reject(t, "once", 1)
		for i := range maxOfRejected {
			q.ask(t, name(i), false).wantGranted(t, "below the limit")
		}
		var waiting []*asked
		for i := range maxWaitingRejected {
			a := q.ask(t, name(maxOfRejected+i), false)
			a.wantWaiting(t, "at the limit")
			waiting = append(waiting, a)
		}
		q.ask(t, name(0), false).wantRefused(t, "too many wait")
		last := waiting[len(waiting)-1]
		last.wantWaiting(t, "")
		q.ask(t, "once", false).wantWaiting(t, "fewer rejections")
		last.wantRefused(t, "it has made room")
		q.ask(t, "clean", false).wantGranted(t, "no rejections")
	})
}

// TestQueueDelaysWaiting: a rejection also delays the checks of that peer that already wait.
func TestQueueDelaysWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var q queue
		q.reject(t, "stranger", freeRejections)
		var asking []*asked
		for range maxPerPeer {
			asking = append(asking, q.ask(t, "stranger", false))
		}
		waiting, known := q.ask(t, "stranger", false), q.ask(t, "stranger", true)
		waiting.wantWaiting(t, "")
		asking[0].wantGranted(t, "")
		asking[0].end(rejected)
		waiting.wantWaiting(t, "over the budget")
		known.wantGranted(t, "accepted before")
		known.end(unanswered)
		time.Sleep(firstPenalty)
		waiting.wantGranted(t, "after the delay")
	})
}

func TestQueueGivesUpWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var q queue
		var asking []*asked
		for range maxPerPeer {
			asking = append(asking, q.ask(t, "peer", false))
		}
		why := errors.New("why")
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(why)
		_, err := q.wait(ctx, "peer", false)
		if _, ok := errors.AsType[*xapi.TransportError](err); !ok || !errors.Is(err, why) {
			t.Errorf("got %v, want a TransportError of its cause", err)
		}
		for _, a := range asking {
			a.end(unanswered)
		}
		if len(q.waiting) != 0 || len(q.asking) != 0 || len(q.peers) != 0 {
			t.Errorf("got %d waiting, %d asking, %d peers, want nothing left", len(q.waiting), len(q.asking), len(q.peers))
		}
	})
}

// TestQueueMemory: the number of remembered peers is bounded.
func TestQueueMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var q queue
		for i := range maxPeers + 100 {
			permit, err := q.wait(t.Context(), fmt.Sprint("stranger", i), false)
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Millisecond)
			permit.end(rejected)
		}
		if n := len(q.peers); n > maxPeers {
			t.Errorf("got %d peers, want at most %d", n, maxPeers)
		}
		if q.peers[fmt.Sprint("stranger", maxPeers+99)] == nil || q.peers["stranger0"] != nil {
			t.Error("others than the oldest were forgotten")
		}
		time.Sleep(forgetPeer)
		permit, err := q.wait(t.Context(), "one more", false)
		if err != nil {
			t.Fatal(err)
		}
		permit.end(unanswered)
		if n := len(q.peers); n != 0 {
			t.Errorf("got %d peers after a minute, want none", n)
		}
	})
}
