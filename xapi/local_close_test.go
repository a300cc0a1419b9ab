package xapi

import (
	"context"
	"errors"
	"net"
	"testing"
	"testing/synctest"
	"time"
)

// A login in progress during Close leaves no session.
func TestLocalCloseDuringLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, h := pipeLocal(time.Second)
		waiting := make(chan error, 1)
		go func() { _, err := l.Epoch(t.Context()); waiting <- err }()
		synctest.Wait()
		start := time.Now()
		if err := l.Close(t.Context()); err != nil {
			t.Error(err)
		}
		if _, logouts := h.counts(); logouts != "OpaqueRef:1" || time.Since(start) != time.Second {
			t.Errorf("got logouts of %q after %v, want the session after 1s", logouts, time.Since(start))
		}
		if err := <-waiting; err != nil {
			t.Errorf("waiting caller: got %v", err)
		}
	})
}

// Close does not wait longer than its context allows, and leaves no goroutine.
func TestLocalCloseGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, h := pipeLocal(time.Second)
		waiting := make(chan error, 1)
		go func() { _, err := l.Epoch(t.Context()); waiting <- err }()
		synctest.Wait()
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second/2)
		defer cancel()
		if err := l.Close(ctx); err != nil || time.Since(start) != time.Second/2 {
			t.Errorf("got %v after %v, want nothing to log out after 0.5s", err, time.Since(start))
		}
		if err := <-waiting; !errors.Is(err, context.Canceled) {
			t.Errorf("waiting caller: got %v, want context.Canceled", err)
		}
		if _, logouts := h.counts(); logouts != "" {
			t.Errorf("got logouts of %q, want none", logouts)
		}
		<-time.After(time.Second) // the host's late answer changes nothing
		if err := l.Do(t.Context(), func(*Session) error { return nil }); !errors.Is(err, net.ErrClosed) {
			t.Errorf("got %v, want net.ErrClosed", err)
		}
		if n, _ := h.counts(); n != 1 {
			t.Errorf("got %d logins, want 1", n)
		}
	})
}
