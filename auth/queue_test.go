package auth

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/xapi"
)

// asked is a question that was queued, in a goroutine of its own.
type asked struct {
	turn *turn
	err  error
	done bool
}

func (q *queue) ask(t *testing.T, peer string, known bool) *asked {
	a := new(asked)
	go func() {
		a.turn, a.err = q.wait(t.Context(), peer, known)
		a.done = true
	}()
	synctest.Wait()
	return a
}

func (a *asked) wantGranted(t *testing.T, what string) {
	t.Helper()
	synctest.Wait()
	if !a.done || a.err != nil {
		t.Fatalf("%s: got done %v, %v, want that it may ask", what, a.done, a.err)
	}
}

func (a *asked) wantWaiting(t *testing.T, what string) {
	t.Helper()
	synctest.Wait()
	if a.done {
		t.Fatalf("%s: got turn %v, %v, want that it waits", what, a.turn != nil, a.err)
	}
}

func (a *asked) wantRefused(t *testing.T, what string) (wait time.Duration) {
	t.Helper()
	synctest.Wait()
	e, ok := errors.AsType[*RejectionsError](a.err)
	if !a.done || !ok || !errors.Is(a.err, ErrTooManyRejections) {
		t.Fatalf("%s: got done %v, %v, want a RejectionsError", what, a.done, a.err)
	}
	return e.Wait
}

func (a *asked) end(o outcome) {
	a.turn.end(o)
	synctest.Wait()
}

// reject has n sessions of a peer rejected.
func (q *queue) reject(t *testing.T, peer string, n int) {
	t.Helper()
	for i := range n {
		a := q.ask(t, peer, false)
		a.wantGranted(t, fmt.Sprintf("rejection %d", i+1))
		a.end(rejected)
	}
}

func TestQueuePenalties(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var q queue
		q.reject(t, "stranger", freeRejections)
		for _, want := range []time.Duration{
			250 * time.Millisecond, 500 * time.Millisecond, time.Second, 2 * time.Second, 4 * time.Second,
			8 * time.Second, 8 * time.Second, 8 * time.Second,
		} {
			q.reject(t, "stranger", 1)
			if wait := q.ask(t, "stranger", false).wantRefused(t, "at once"); wait != want {
				t.Errorf("got a penalty of %v, want %v", wait, want)
			}
			honest := q.ask(t, "honest", false)
			honest.wantGranted(t, "another peer")
			honest.end(accepted)
			known := q.ask(t, "stranger", true)
			known.wantGranted(t, "a session that was accepted before")
			known.end(unanswered)
			time.Sleep(want - 1)
			q.ask(t, "stranger", false).wantRefused(t, "just before its end")
			time.Sleep(1)
		}
		time.Sleep(forgetPeer)
		q.reject(t, "stranger", freeRejections) // forgotten
		good := q.ask(t, "stranger", false)
		good.wantGranted(t, "")
		good.end(accepted)
		q.reject(t, "stranger", freeRejections) // forgiven
	})
}

// Peers with many rejections come after those with few, and those after all others.
func TestQueueOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var q queue
		q.reject(t, "twice", 2)
		q.reject(t, "once", 1)
		var asking []*asked
		for i := range maxQuestions {
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

// Peers with rejections cannot fill all places, nor hold too many connections that
// wait; of those the worst have to go.
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

// Sessions that wait when their peer's last one is rejected need not be asked about.
func TestQueueRefusesThoseThatWait(t *testing.T) {
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
		waiting.wantRefused(t, "over the budget")
		known.wantGranted(t, "accepted before")
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

// However many addresses strangers have, what is remembered of them is bounded.
func TestQueueMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var q queue
		for i := range maxPeers + 100 {
			turn, err := q.wait(t.Context(), fmt.Sprint("stranger", i), false)
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Millisecond)
			turn.end(rejected)
		}
		if n := len(q.peers); n > maxPeers {
			t.Errorf("got %d peers, want at most %d", n, maxPeers)
		}
		if q.peers[fmt.Sprint("stranger", maxPeers+99)] == nil || q.peers["stranger0"] != nil {
			t.Error("it is not the oldest that were forgotten")
		}
		time.Sleep(forgetPeer)
		turn, err := q.wait(t.Context(), "one more", false)
		if err != nil {
			t.Fatal(err)
		}
		turn.end(unanswered)
		if n := len(q.peers); n != 0 {
			t.Errorf("got %d peers after a minute, want none", n)
		}
	})
}
