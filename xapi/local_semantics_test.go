package xapi_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"xapi-nbd/xapi"
	"xapi-nbd/xapi/xapitest"
)

const (
	loginCall    = "session.login_with_password"
	uuidCall     = "session.get_uuid"
	networksCall = "network.get_all_records"
)

func local(t *testing.T) (*xapitest.Host, *xapi.Local) {
	t.Helper()
	h, c := host(t)
	return h, xapi.NewLocal(c, "xapi-nbd")
}

// wantCalls compares the calls since the last time.
func wantCalls(t *testing.T, h *xapitest.Host, want ...string) {
	t.Helper()
	var got []string
	for _, c := range h.Calls() {
		got = append(got, c.Method)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
	h.ResetCalls()
}

func wantEpoch(t *testing.T, ask func(context.Context) (xapi.Epoch, error), want xapi.Epoch) {
	t.Helper()
	if got, err := ask(t.Context()); got != want || err != nil {
		t.Errorf("got epoch %d, %v, want %d", got, err, want)
	}
}

// networks makes a read-only call.
func networks(ctx context.Context) func(*xapi.Session) error {
	return func(s *xapi.Session) error {
		if _, err := s.NetworkRecords(ctx); err != nil {
			return fmt.Errorf("networks: %w", err)
		}
		return nil
	}
}

func TestLocalDo(t *testing.T) {
	h, l := local(t)
	ask := func() error { return l.Do(t.Context(), networks(t.Context())) }
	for range 2 {
		if err := ask(); err != nil {
			t.Fatal(err)
		}
	}
	wantCalls(t, h, loginCall, networksCall, networksCall)

	h.Restart()
	if err := ask(); err != nil {
		t.Errorf("after a restart: %v", err)
	}
	wantCalls(t, h, networksCall, loginCall, networksCall)

	h.FailAlways(networksCall, "SESSION_INVALID", "x")
	if err := ask(); !errors.Is(err, xapi.SessionInvalid) {
		t.Errorf("got %v, want SESSION_INVALID", err)
	}
	wantCalls(t, h, networksCall, loginCall, networksCall)
	h.ClearFaults()

	// A login that fails leaves the next caller to try again.
	h.Restart()
	h.Fail(loginCall, "INTERNAL_ERROR", "x")
	if err := ask(); !errors.Is(err, xapi.InternalError) {
		t.Errorf("got %v, want INTERNAL_ERROR", err)
	}
	if err := ask(); err != nil {
		t.Errorf("after a failed login: %v", err)
	}
	wantCalls(t, h, networksCall, loginCall, loginCall, networksCall)
	wantEpoch(t, l.Epoch, 4) // four successful logins
}

// Do calls twice only if the session has ended.
func TestLocalDoAgain(t *testing.T) {
	tests := []struct {
		name   string
		code   string
		params []string
		again  bool
	}{
		{"session", "SESSION_INVALID", []string{"x"}, true},
		{"session without parameters", "SESSION_INVALID", nil, true},
		{"ended meanwhile", "HANDLE_INVALID", []string{"session", "x"}, true},
		{"another handle", "HANDLE_INVALID", []string{"host", "x"}, false},
		{"handle without parameters", "HANDLE_INVALID", nil, false},
		{"booting", "HOST_STILL_BOOTING", nil, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h, l := local(t)
			h.Fail(networksCall, tt.code, tt.params...)
			err := l.Do(t.Context(), networks(t.Context()))
			if tt.again {
				if err != nil {
					t.Errorf("got %v, want success with another session", err)
				}
				wantCalls(t, h, loginCall, networksCall, loginCall, networksCall)
				wantEpoch(t, l.Epoch, 2)
				return
			}
			if !errors.Is(err, xapi.ErrorCode(tt.code)) || !strings.HasPrefix(err.Error(), "networks: ") {
				t.Errorf("got %v, want f's error", err)
			}
			wantCalls(t, h, loginCall, networksCall)
		})
	}
}

func TestLocalEpoch(t *testing.T) {
	h, l := local(t)
	wantEpoch(t, l.Epoch, 1)
	wantCalls(t, h, loginCall)
	wantEpoch(t, l.Check, 1)
	wantCalls(t, h, uuidCall)

	h.Restart()
	wantEpoch(t, l.Epoch, 1) // not noticed
	wantCalls(t, h)
	wantEpoch(t, l.Check, 2)
	wantCalls(t, h, uuidCall, loginCall)
	wantEpoch(t, l.Check, 2)
	wantEpoch(t, l.Epoch, 2)
	wantCalls(t, h, uuidCall)
}

// An error that says nothing about the session begins no epoch.
func TestLocalCheckFailures(t *testing.T) {
	h, l := local(t)
	wantEpoch(t, l.Epoch, 1)

	h.Stop()
	_, err := l.Check(t.Context())
	if _, ok := errors.AsType[*xapi.TransportError](err); !ok {
		t.Errorf("stopped: got %v, want a TransportError", err)
	}
	if err := h.Resume(); err != nil {
		t.Fatal(err)
	}
	h.LoseReply(uuidCall)
	if _, err := l.Check(t.Context()); err == nil {
		t.Error("lost reply: got no error")
	}
	h.Booting(true)
	if _, err := l.Check(t.Context()); !errors.Is(err, xapi.HostStillBooting) {
		t.Errorf("booting: got %v, want HOST_STILL_BOOTING", err)
	}
	h.Booting(false)
	wantEpoch(t, l.Check, 1)

	h.Restart()
	h.Fail(loginCall, "INTERNAL_ERROR", "x")
	if _, err := l.Check(t.Context()); !errors.Is(err, xapi.InternalError) {
		t.Errorf("no login: got %v, want INTERNAL_ERROR", err)
	}
	wantEpoch(t, l.Check, 2) // no second call with the ended session
}

func TestLocalAdopt(t *testing.T) {
	h, c := host(t)
	l := xapi.NewLocal(c, "xapi-nbd")
	s := login(t, c)
	h.ResetCalls()
	l.Adopt(s)
	wantEpoch(t, l.Epoch, 1)
	err := l.Do(t.Context(), func(got *xapi.Session) error {
		if got != s {
			t.Error("got a session other than the adopted one")
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	wantCalls(t, h)

	// A second one ends nothing, and so begins no epoch.
	l.Adopt(login(t, c))
	wantEpoch(t, l.Epoch, 1)
	if n := h.Sessions(); n != 2 {
		t.Errorf("got %d sessions, want 2", n)
	}
	for range 2 {
		if err := l.Close(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if n := h.Sessions(); n != 0 {
		t.Errorf("got %d sessions left, want none", n)
	}
	wantCalls(t, h, loginCall, "session.logout", "session.logout")
}

func TestLocalClose(t *testing.T) {
	t.Run("never used", func(t *testing.T) {
		h, l := local(t)
		if err := l.Close(t.Context()); err != nil {
			t.Error(err)
		}
		wantCalls(t, h)
	})
	t.Run("alive", func(t *testing.T) {
		h, l := local(t)
		wantEpoch(t, l.Epoch, 1)
		h.Restart()
		wantEpoch(t, l.Check, 2)
		h.ResetCalls()
		if err := l.Close(t.Context()); err != nil {
			t.Error(err)
		}
		wantCalls(t, h, "session.logout")
		if n := h.Sessions(); n != 0 {
			t.Errorf("got %d sessions left, want none", n)
		}
	})
	t.Run("dead", func(t *testing.T) {
		h, l := local(t)
		wantEpoch(t, l.Epoch, 1)
		h.Restart()
		if err := l.Close(t.Context()); err != nil {
			t.Errorf("got %v, want no error about a session that is gone", err)
		}
		wantCalls(t, h, loginCall, "session.logout")
	})
	t.Run("unreachable", func(t *testing.T) {
		h, l := local(t)
		wantEpoch(t, l.Epoch, 1)
		h.Stop()
		err := l.Close(t.Context())
		if _, ok := errors.AsType[*xapi.TransportError](err); !ok {
			t.Errorf("got %v, want a TransportError", err)
		}
	})
}
