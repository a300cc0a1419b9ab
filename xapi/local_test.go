package xapi

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// pipeHost is a xapi at the other end of net.Pipe, for tests in fake time. A login takes
// loginTime and returns "OpaqueRef:<number of the login>"; other calls return "" at once.
type pipeHost struct {
	loginTime time.Duration

	mu      sync.Mutex
	logins  int
	logouts []string // refs, in the order of their logouts
}

// pipeLocal returns a Local of such a host. It must be called in a synctest bubble.
func pipeLocal(loginTime time.Duration) (*Local, *pipeHost) {
	c, h := New(Config{CallTimeout: time.Minute}), &pipeHost{loginTime: loginTime}
	c.transport.DialContext = func(context.Context, string, string) (net.Conn, error) {
		ours, theirs := net.Pipe()
		go h.serve(theirs)
		return ours, nil
	}
	return NewLocal(c, "test"), h
}

func (h *pipeHost) serve(conn net.Conn) {
	defer conn.Close()
	req, err := http.ReadRequest(bufio.NewReader(conn))
	if err != nil {
		return
	}
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return
	}
	if !strings.Contains(string(body), loginMethod) {
		_, ref, _ := strings.Cut(string(body), "<string>")
		ref, _, _ = strings.Cut(ref, "</string>")
		h.mu.Lock()
		h.logouts = append(h.logouts, ref)
		h.mu.Unlock()
		io.WriteString(conn, ok(successXML("")))
		return
	}
	h.mu.Lock()
	h.logins++
	answer := ok(successXML(fmt.Sprintf("OpaqueRef:%d", h.logins)))
	h.mu.Unlock()
	<-time.After(h.loginTime)
	io.WriteString(conn, answer)
}

func (h *pipeHost) counts() (logins int, logouts string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.logins, strings.Join(h.logouts, " ")
}

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
