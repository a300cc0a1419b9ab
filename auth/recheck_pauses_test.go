package auth

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/xapi"
)

func TestRecheckOff(t *testing.T) {
	for _, every := range []time.Duration{0, -time.Second} {
		c := newChecked(t, every)
		n := c.connect(t, c.newSession())
		c.host.ExpireSession(n.ref)
		c.host.ResetCalls()
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 24*time.Hour)
			defer cancel()
			start := time.Now()
			c.Run(ctx)
			if got := time.Since(start); got != 24*time.Hour {
				t.Errorf("Run ended after %v, want it to wait for its context", got)
			}
		})
		if calls := c.host.Calls(); len(calls) != 0 {
			t.Errorf("got calls %v, want none", calls)
		}
		n.wantAlive(t)
		if len(c.watches) != 0 {
			t.Errorf("got %d watches that are never checked, want none", len(c.watches))
		}
		n.stop()
	}
}

// TestRecheckPauses: a pause begins at the end of a round, and the first round follows one.
// The calls use a real socket, but take no fake time.
func TestRecheckPauses(t *testing.T) {
	const every = 5 * time.Minute
	c := newChecked(t, every)
	c.connect(t, c.newSession())
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		var at []string
		for n := range 6 {
			c.after(n+1, func() {
				at = append(at, time.Since(start).String())
				if n == 1 { // the first round's second call is a slow one
					<-time.After(time.Minute)
				}
			})
		}
		ctx, cancel := context.WithTimeout(t.Context(), 17*time.Minute)
		defer cancel()
		c.Run(ctx)
		want := "5m0s 5m0s 11m0s 11m0s 16m0s 16m0s"
		if got := strings.Join(at, " "); got != want {
			t.Errorf("got calls at %s, want %s", got, want)
		}
	})
}

// TestRecheckRoundIsBounded: a round lasts half a pause at most, but at least ten seconds.
func TestRecheckRoundIsBounded(t *testing.T) {
	for every, want := range map[time.Duration]time.Duration{5 * time.Minute: 150 * time.Second, time.Second: minRound} {
		c := newChecked(t, every)
		for range 3 {
			c.connect(t, c.newSession())
		}
		c.host.ResetCalls()
		synctest.Test(t, func(t *testing.T) {
			c.after(2, func() { <-time.After(want - 1) })
			c.after(3, func() { <-time.After(2) })
			c.round(t.Context())
		})
		if calls := c.host.Calls(); len(calls) != 3 {
			t.Errorf("every %v: got calls %v, want three until the time is over", every, calls)
		}
	}
}

// TestRecheckConcurrently: connections begin and end while Run checks; each is ended once.
func TestRecheckConcurrently(t *testing.T) {
	c := newChecked(t, time.Millisecond)
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { c.Run(ctx) })
	defer running.Wait()
	defer cancel()

	var connections sync.WaitGroup
	for i := range 20 {
		ref := c.newSession()
		epoch, err := c.local.Epoch(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		connections.Go(func() {
			s := c.client.Bind(xapi.SessionRef(ref))
			ended := make(chan error, 2)
			stop := c.Watch(Grant{s, epoch}, func(err error) { ended <- err })
			defer stop()
			if i%2 == 0 {
				return
			}
			c.host.ExpireSession(ref)
			if err := <-ended; !errors.Is(err, ErrSession) {
				t.Errorf("got %v, want ErrSession", err)
			}
			stop()
			if len(ended) != 0 {
				t.Error("ended twice")
			}
		})
	}
	connections.Wait()
}

func TestWatchHidesItsRef(t *testing.T) {
	c := newChecked(t, time.Hour)
	n := c.connect(t, c.newSession())
	for w := range c.watches {
		if text := fmt.Sprintf("%v %+v %#v", *w, w, w); strings.Contains(text, n.ref) {
			t.Error("the ref is in the formatted watch")
		}
	}
}
