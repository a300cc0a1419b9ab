package auth

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"xapi-nbd/xapi"
	"xapi-nbd/xapi/xapitest"
)

const (
	uuidCall  = "session.get_uuid"
	loginCall = "session.login_with_password"
)

// afterCall is a log handler that is called at the end of each call of a client, before the
// caller gets the result.
type afterCall func()

func (afterCall) Enabled(context.Context, slog.Level) bool        { return true }
func (f afterCall) Handle(_ context.Context, r slog.Record) error { f(); return nil }
func (f afterCall) WithAttrs([]slog.Attr) slog.Handler            { return f }
func (f afterCall) WithGroup(string) slog.Handler                 { return f }

// checked is a Rechecker of a simulated host. Tests call round, except those that use Run.
type checked struct {
	*Rechecker
	host   *xapitest.Host
	client *xapi.Client
	local  *xapi.Local
	log    strings.Builder

	mu    sync.Mutex // guards calls and hooks
	calls int
	hooks map[int]func() // by number of the call
}

func newChecked(t *testing.T, every time.Duration) *checked {
	t.Helper()
	h, err := xapitest.Start(xapitest.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Errorf("close host: %v", err)
		}
	})
	c := &checked{host: h, hooks: make(map[int]func())}
	c.client = xapi.New(xapi.Config{Socket: h.Socket(), CallTimeout: 20 * time.Second, Logger: slog.New(afterCall(c.called))})
	t.Cleanup(c.client.Close)
	c.local = xapi.NewLocal(c.client, "xapi-nbd")
	c.Rechecker = NewRechecker(c.local, every, slog.New(slog.NewTextHandler(&c.log, nil)))
	return c
}

func (c *checked) called() {
	c.mu.Lock()
	c.calls++
	hook := c.hooks[c.calls]
	c.mu.Unlock()
	if hook != nil {
		hook()
	}
}

// after makes f run between the n-th call from now on and the next.
func (c *checked) after(n int, f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hooks[c.calls+n] = f
}

// connection is a watched connection.
type connection struct {
	ref  string
	stop func()
	ends []error
}

// connect authorizes a client's session as the service does and watches it.
func (c *checked) connect(t *testing.T, ref string) *connection {
	t.Helper()
	g, err := NewAuthorizer(c.client, c.local).Authorize(t.Context(), "peer", Request{Session: xapi.SessionRef(ref)})
	if err != nil {
		t.Fatal(err)
	}
	n := &connection{ref: ref}
	n.stop = c.Watch(g, func(err error) { n.ends = append(n.ends, err) })
	return n
}

func (c *checked) newSession() string { return c.host.NewSession(xapitest.RoleVMAdmin) }

// wantRound makes a round and compares its calls.
func (c *checked) wantRound(t *testing.T, want ...string) {
	t.Helper()
	c.host.ResetCalls()
	c.round(t.Context())
	var got []string
	for _, call := range c.host.Calls() {
		who := "client "
		if call.Local {
			who = "local "
		}
		got = append(got, who+call.Method)
	}
	if !slices.Equal(got, want) {
		t.Errorf("got calls %q, want %q", got, want)
	}
}

func (n *connection) wantAlive(t *testing.T) {
	t.Helper()
	if len(n.ends) != 0 {
		t.Errorf("got the connection ended with %v, want it alive", n.ends)
	}
}

func (n *connection) wantEnded(t *testing.T) {
	t.Helper()
	if len(n.ends) != 1 {
		t.Errorf("got ends %v, want one", n.ends)
		return
	}
	err := n.ends[0]
	if !errors.Is(err, ErrSession) || !strings.HasPrefix(err.Error(), "session rejected by xapi (") {
		t.Errorf("got %v, want ErrSession", err)
	}
	if e, _ := errors.AsType[*xapi.Error](err); strings.Contains(err.Error()+e.Error(), n.ref) {
		t.Error("the error holds the ref")
	}
}

func TestRecheckEndsEndedSessions(t *testing.T) {
	c := newChecked(t, time.Hour)
	loggedOut, expired, alive := c.connect(t, c.newSession()), c.connect(t, c.newSession()), c.connect(t, c.newSession())
	c.wantRound(t, "local "+uuidCall, "client "+uuidCall, "client "+uuidCall, "client "+uuidCall)
	for _, n := range []*connection{loggedOut, expired, alive} {
		n.wantAlive(t)
	}

	if err := c.client.Bind(xapi.SessionRef(loggedOut.ref)).Logout(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.host.ExpireSession(expired.ref)
	c.round(t.Context())
	loggedOut.wantEnded(t)
	expired.wantEnded(t)
	alive.wantAlive(t)

	c.wantRound(t, "local "+uuidCall, "client "+uuidCall)
	alive.wantAlive(t)
	c.host.ExpireSession(alive.ref)
	c.wantRound(t, "local "+uuidCall, "client "+uuidCall, "local "+uuidCall)
	loggedOut.wantEnded(t)
	expired.wantEnded(t)
	alive.wantEnded(t)
	c.wantRound(t)
	if c.log.Len() != 0 {
		t.Errorf("got a log:\n%s", c.log.String())
	}
}

// TestRecheckAsksOncePerSession: connections with the same session share its check.
func TestRecheckAsksOncePerSession(t *testing.T) {
	c := newChecked(t, time.Hour)
	ref := c.newSession()
	first, second, stopped := c.connect(t, ref), c.connect(t, ref), c.connect(t, ref)
	stopped.stop()
	c.wantRound(t, "local "+uuidCall, "client "+uuidCall)
	c.host.ExpireSession(ref)
	c.wantRound(t, "local "+uuidCall, "client "+uuidCall, "local "+uuidCall)
	first.wantEnded(t)
	second.wantEnded(t)
	stopped.wantAlive(t)
}

// TestRecheckWithoutConnections: without connections there are no calls, not even with the local session.
func TestRecheckWithoutConnections(t *testing.T) {
	c := newChecked(t, time.Hour)
	c.wantRound(t)
	n := c.connect(t, c.newSession())
	n.stop()
	n.stop()
	c.host.ExpireSession(n.ref)
	c.wantRound(t)
	n.wantAlive(t)
}

// TestRecheckSparesConnectionsAcrossRestarts: a restart of xapi at any point ends every session and no connection.
func TestRecheckSparesConnectionsAcrossRestarts(t *testing.T) {
	tests := []struct {
		name    string
		arrange func(c *checked, ref string)
	}{
		{"before the round", func(c *checked, _ string) { c.host.Restart() }},
		{"before the round, and noticed", func(c *checked, _ string) {
			c.host.Restart()
			c.local.Check(context.Background())
		}},
		{"before the client's session is asked about", func(c *checked, _ string) { c.after(1, c.host.Restart) }},
		{"after the client's session was ended", func(c *checked, ref string) {
			c.host.ExpireSession(ref)
			c.after(2, c.host.Restart)
		}},
		{"twice", func(c *checked, _ string) {
			c.after(1, c.host.Restart)
			c.after(4, c.host.Restart)
		}},
		{"and no local login at first", func(c *checked, _ string) {
			c.after(1, func() {
				c.host.Restart()
				c.host.Fail(loginCall, "INTERNAL_ERROR", "x")
			})
		}},
		{"and the lack of an answer", func(c *checked, _ string) {
			c.after(1, c.host.Restart)
			c.after(2, c.host.Stop)
			c.after(3, func() {
				if err := c.host.Resume(); err != nil {
					panic(err)
				}
			})
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := newChecked(t, time.Hour)
			n := c.connect(t, c.newSession())
			tt.arrange(c, n.ref)
			for range 4 {
				c.round(t.Context())
				n.wantAlive(t)
			}
			c.wantRound(t) // exempt for good
			if got := strings.Count(c.log.String(), "level=INFO"); got != 1 || !strings.Contains(c.log.String(), "connections=1") {
				t.Errorf("got %d lines, want one that counts the connection:\n%s", got, c.log.String())
			}
		})
	}
}

// TestRecheckFails: a failed check ends no connection and does not end the checks.
func TestRecheckFails(t *testing.T) {
	tests := []struct {
		name    string
		arrange func(c *checked, ref string)
	}{
		{"unreachable", func(c *checked, _ string) { c.host.Stop() }},
		{"unreachable after the local session's answer", func(c *checked, _ string) { c.after(1, c.host.Stop) }},
		{"unreachable after the client's session was rejected", func(c *checked, ref string) {
			c.host.ExpireSession(ref)
			c.after(2, c.host.Stop)
		}},
		{"booting", func(c *checked, _ string) { c.host.Booting(true) }},
		{"booting after the local session's answer", func(c *checked, _ string) {
			c.after(1, func() { c.host.Booting(true) })
		}},
		{"reply lost", func(c *checked, _ string) { c.after(1, func() { c.host.LoseReply(uuidCall) }) }},
		{"another error", func(c *checked, _ string) {
			c.after(1, func() { c.host.Fail(uuidCall, "INTERNAL_ERROR", "x") })
		}},
		{"another handle", func(c *checked, _ string) {
			c.after(1, func() { c.host.Fail(uuidCall, "HANDLE_INVALID", "host", "x") })
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := newChecked(t, time.Hour)
			n := c.connect(t, c.newSession())
			tt.arrange(c, n.ref)
			c.round(t.Context())
			n.wantAlive(t)

			c.host.Booting(false)
			if err := c.host.Resume(); err != nil {
				t.Fatal(err)
			}
			c.host.ExpireSession(n.ref)
			c.round(t.Context())
			n.wantEnded(t)
		})
	}
}

// TestRecheckGoesOnAfterAFailure: after a failed check the other sessions are checked.
func TestRecheckGoesOnAfterAFailure(t *testing.T) {
	c := newChecked(t, time.Hour)
	a, b := c.connect(t, c.newSession()), c.connect(t, c.newSession())
	c.host.ExpireSession(a.ref)
	c.host.ExpireSession(b.ref)
	c.after(1, func() { c.host.DropConnection(uuidCall) })
	c.round(t.Context())
	if got := len(a.ends) + len(b.ends); got != 1 {
		t.Errorf("got %d connections ended, want the one whose check was answered", got)
	}
}

// TestRecheckSessionThatVanishes: a session may end during its check.
func TestRecheckSessionThatVanishes(t *testing.T) {
	c := newChecked(t, time.Hour)
	n := c.connect(t, c.newSession())
	c.after(1, func() { c.host.Fail(uuidCall, "HANDLE_INVALID", "session", n.ref) })
	c.round(t.Context())
	n.wantEnded(t)
}

// TestRecheckInANewEpoch: sessions from after a restart are checked beside exempt ones.
func TestRecheckInANewEpoch(t *testing.T) {
	c := newChecked(t, time.Hour)
	old := c.connect(t, c.newSession())
	c.host.Restart()
	if epoch, err := c.local.Check(t.Context()); epoch != 2 || err != nil {
		t.Fatalf("got epoch %d, %v, want 2", epoch, err)
	}
	fresh := c.connect(t, c.newSession())
	c.round(t.Context())
	c.wantRound(t, "local "+uuidCall, "client "+uuidCall) // not about the old one
	c.host.ExpireSession(fresh.ref)
	c.round(t.Context())
	fresh.wantEnded(t)
	old.wantAlive(t)
}

// TestRecheckAfterAnUnnoticedRestart: a restart that was not noticed before a client
// connected does not exempt the client's session, which xapi knows.
func TestRecheckAfterAnUnnoticedRestart(t *testing.T) {
	c := newChecked(t, time.Hour)
	if _, err := c.local.Epoch(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.host.Restart()
	n := c.connect(t, c.newSession())
	c.round(t.Context())
	n.wantAlive(t)
	c.host.ExpireSession(n.ref)
	c.round(t.Context())
	n.wantEnded(t)
}

// TestRecheckLogoutBeforeTheFirstRound: the same if the client is logged out before the first round.
func TestRecheckLogoutBeforeTheFirstRound(t *testing.T) {
	tests := []struct {
		name    string
		arrange func(c *checked)
	}{
		{"restart before the connection", func(c *checked) { c.host.Restart() }},
		{"restart while it is authorized", func(c *checked) {
			c.after(1, c.host.Restart) // ends the client's session, which is made again
		}},
		{"no restart", func(*checked) {}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := newChecked(t, time.Hour)
			if _, err := c.local.Epoch(t.Context()); err != nil {
				t.Fatal(err)
			}
			tt.arrange(c)
			ref := c.newSession()
			if strings.Contains(tt.name, "while") {
				g, err := NewAuthorizer(c.client, c.local).Authorize(t.Context(), "peer", Request{Session: xapi.SessionRef(ref)})
				if !errors.Is(err, ErrSession) || g.Session != nil {
					t.Fatalf("got %v, want that the session of before the restart is rejected", err)
				}
				ref = c.newSession()
			}
			n := c.connect(t, ref)
			c.host.ExpireSession(n.ref)
			c.round(t.Context())
			n.wantEnded(t)
		})
	}
}

// TestRecheckLeavesNewerEpochsAlone: a connection of an epoch that began during a round is left to the next round.
func TestRecheckLeavesNewerEpochsAlone(t *testing.T) {
	c := newChecked(t, time.Hour)
	old := c.connect(t, c.newSession())
	var fresh *connection
	c.after(1, func() {
		c.host.Restart()
		c.local.Check(t.Context())
		fresh = c.connect(t, c.newSession())
	})
	c.wantRound(t, "local "+uuidCall,
		"client "+uuidCall, "local "+loginCall, "client session.get_record", "local "+uuidCall, // by the function above; the dead session counts as a client's
		"client "+uuidCall, "local "+uuidCall)
	old.wantAlive(t)
	fresh.wantAlive(t)
	c.host.ExpireSession(fresh.ref)
	c.round(t.Context())
	old.wantAlive(t)
	fresh.wantEnded(t)
}

// TestRecheckStopDuringEnd: end may call stop for its own connection, without effect, and for
// another one of the same session, whose end is not called then.
func TestRecheckStopDuringEnd(t *testing.T) {
	c := newChecked(t, time.Hour)
	ref := c.newSession()
	conns := []*connection{c.connect(t, ref), c.connect(t, ref)}
	var ended int
	for w := range c.watches {
		w.end = func(error) {
			ended++
			for _, n := range conns {
				n.stop()
			}
		}
	}
	c.host.ExpireSession(ref)
	c.round(t.Context())
	if ended != 1 {
		t.Errorf("got %d connections ended, want 1", ended)
	}
}
