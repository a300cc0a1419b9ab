package xapi

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// Any number of callers without a session, or with an ended one, share one login.
func TestLocalLogsInOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, h := pipeLocal(time.Second)
		start := time.Now()
		var callers sync.WaitGroup
		for range 20 {
			callers.Go(func() {
				var refs []string
				err := l.Do(t.Context(), func(s *Session) error {
					refs = append(refs, string(s.Ref()))
					if len(refs) == 1 {
						return newError("A.b", []string{"SESSION_INVALID", "x"}, "")
					}
					return nil
				})
				if got := strings.Join(refs, " "); err != nil || got != "OpaqueRef:1 OpaqueRef:2" {
					t.Errorf("got sessions %s, %v, want one, then another", got, err)
				}
			})
		}
		callers.Wait()
		if n, _ := h.counts(); n != 2 || time.Since(start) != 2*time.Second {
			t.Errorf("got %d logins in %v, want 2 in 2s", n, time.Since(start))
		}
		// A caller with an error of the old session does not replace the new one.
		if _, epoch, err := l.replace(t.Context(), 1); epoch != 2 || err != nil {
			t.Errorf("got epoch %d, %v, want 2", epoch, err)
		}
		if err := l.Close(t.Context()); err != nil {
			t.Error(err)
		}
		if n, logouts := h.counts(); n != 2 || logouts != "OpaqueRef:2" {
			t.Errorf("got %d logins and logouts of %q, want 2 and the living session", n, logouts)
		}
	})
}

// When the context of the caller that started the login ends, the others still get the
// session.
func TestLocalLoginOutlivesItsFirstCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, h := pipeLocal(time.Second)
		why := errors.New("connection gone")
		ctx, cancel := context.WithCancelCause(t.Context())
		first, second := make(chan error, 1), make(chan error, 1)
		go func() { _, err := l.Epoch(ctx); first <- err }()
		synctest.Wait()
		go func() { _, err := l.Epoch(t.Context()); second <- err }()
		synctest.Wait()

		start := time.Now()
		cancel(why)
		err := <-first
		if _, ok := errors.AsType[*TransportError](err); !ok || !errors.Is(err, why) || time.Since(start) != 0 {
			t.Errorf("first caller: got %v after %v, want its own cause at once", err, time.Since(start))
		}
		if err := <-second; err != nil {
			t.Errorf("second caller: got %v", err)
		}
		if n, _ := h.counts(); n != 1 {
			t.Errorf("got %d logins, want 1", n)
		}
		if err := l.Close(t.Context()); err != nil {
			t.Error(err)
		}
	})
}
