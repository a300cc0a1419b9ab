package auth

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/xapi"
	"xapi-nbd/xapi/xapitest"
)

func TestMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		dead, alive := m.digest("dead"), m.digest("alive")
		why := errors.New("why")
		m.reject(dead, why)
		m.accept(alive)
		if err := m.rejection(dead); !errors.Is(err, why) || m.rejection(alive) != nil {
			t.Errorf("got %v, want the error of the rejected session alone", err)
		}
		if m.wasAccepted(dead) || !m.wasAccepted(alive) {
			t.Error("the accepted session is not remembered, or another one is")
		}
		time.Sleep(rejectedFor)
		if err := m.rejection(dead); err != nil {
			t.Errorf("got %v after %v, want it forgotten", err, rejectedFor)
		}
		m.reject(alive, why)
		if m.wasAccepted(alive) || m.rejection(alive) == nil {
			t.Error("a rejected session counts as accepted")
		}
		m.accept(alive)
		time.Sleep(acceptedFor)
		if m.wasAccepted(alive) {
			t.Error("an accepted session does not expire")
		}
	})
}

func TestMemoryIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		fill := func() {
			for i := range 2 * maxRejected {
				id := m.digest(xapi.SessionRef(fmt.Sprint(i)))
				m.reject(id, ErrSession)
				m.accept(m.digest(xapi.SessionRef(fmt.Sprint("good", i))))
			}
			if len(m.rejected) > maxRejected || len(m.accepted) > maxAccepted {
				t.Errorf("got %d rejected and %d accepted sessions, want at most %d and %d", len(m.rejected), len(m.accepted), maxRejected, maxAccepted)
			}
		}
		fill()
		time.Sleep(rejectedFor)
		fill()
		if m.rejection(m.digest("0")) == nil {
			t.Error("an expired entry takes the place of a new one")
		}
		last := m.digest("last")
		m.accept(last)
		if !m.wasAccepted(last) {
			t.Error("the new one was forgotten")
		}
	})
}

// TestMemoryHoldsNoRefs: the memory holds digests with a random key, and no ref.
func TestMemoryHoldsNoRefs(t *testing.T) {
	const ref = "OpaqueRef:5ec7e75e-0000-4000-8000-000000000000"
	m := newMemory()
	d := m.digest(ref)
	m.reject(d, ErrSession)
	m.accept(d)
	if text := fmt.Sprintf("%+v", m); strings.Contains(text, ref) {
		t.Error("the ref is in the memory")
	}
	if other := newMemory().digest(ref); bytes.Equal(other[:], d[:]) {
		t.Error("the digest has no key")
	}
}

// TestAuthorizeCalls: a rejected session is rejected again without a call for a while, an
// accepted one is checked each time, and rejections delay the next checks of that peer,
// but not those of others.
func TestAuthorizeCalls(t *testing.T) {
	c := newChecked(t, time.Hour)
	a := NewAuthorizer(c.client, c.local)
	good := Request{Session: xapi.SessionRef(c.newSession())}
	ask := func(peer string, r Request, want error, calls ...string) {
		t.Helper()
		c.host.ResetCalls()
		if _, err := a.Authorize(t.Context(), peer, r); !errors.Is(err, want) {
			t.Errorf("%s: got %v, want %v", peer, err, want)
		}
		var got []string
		for _, call := range c.host.Calls() {
			got = append(got, call.Method)
		}
		if !slices.Equal(got, calls) {
			t.Errorf("%s: got calls %q, want %q", peer, got, calls)
		}
	}
	// delayed fails the test unless the check waits; 100 ms are enough on a busy machine.
	delayed := func(peer string, r Request) {
		t.Helper()
		a.queue.peers[peer].until = time.Now().Add(time.Hour)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		c.host.ResetCalls()
		_, err := a.Authorize(ctx, peer, r)
		if calls := c.host.Calls(); !errors.Is(err, context.Canceled) || len(calls) > 0 {
			t.Errorf("%s: got %v and %d calls, want that the check waits", peer, err, len(calls))
		}
	}
	const record = "session.get_record"
	ask("honest", good, nil, loginCall, record, uuidCall)
	ask("honest", good, nil, record, uuidCall)
	for i := range freeRejections + 1 {
		guess := Request{Session: xapi.SessionRef(fmt.Sprint("guess", i))}
		ask("stranger", guess, ErrSession, record)
		ask("stranger", guess, ErrSession)
		ask("another stranger", guess, ErrSession)
	}
	if a.queue.peers["stranger"].until.IsZero() {
		t.Error("rejections do not delay the peer")
	}
	delayed("stranger", Request{Session: "one more"})
	ask("honest", good, nil, record, uuidCall)
	ask("new", Request{Session: xapi.SessionRef(c.newSession())}, nil, record, uuidCall)
	ask("stranger", good, nil, record, uuidCall) // from the same address; it was accepted before

	// Errors that say nothing about the session are not remembered and delay no peer.
	for range freeRejections + 2 {
		c.host.Fail(record, "INTERNAL_ERROR", "x")
		ask("unlucky", Request{Session: xapi.SessionRef(c.newSession())}, xapi.InternalError, record)
	}
	ask("unlucky", Request{Session: xapi.SessionRef(c.newSession())}, nil, record, uuidCall)
	for range freeRejections + 1 {
		ask("weak", Request{Session: xapi.SessionRef(c.host.NewSession(xapitest.RoleReadOnly))}, ErrPermission, record)
	}
	if a.queue.peers["weak"].until.IsZero() {
		t.Error("rejections do not delay the peer")
	}
	delayed("weak", Request{Session: xapi.SessionRef(c.host.NewSession(xapitest.RoleReadOnly))})
}
