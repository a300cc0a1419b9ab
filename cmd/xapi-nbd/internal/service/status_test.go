package service

import (
	"strings"
	"testing"
	"time"

	"xapi-nbd/cmd/xapi-nbd/internal/control"
	"xapi-nbd/xapi/xapitest"
)

// TestStatusWithoutXapi: a status makes a call to xapi if there was none for a while.
func TestStatusWithoutXapi(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	s := w.inside(nil)
	w.host.Stop()
	s.health.mu.Lock()
	s.health.answered = s.health.answered.Add(-time.Hour) // as if it was long ago
	s.health.mu.Unlock()
	r := s.Status(t.Context())
	if r.Xapi.Reachable || r.Xapi.LastError == "" {
		t.Errorf("got %+v, want it unreachable with a reason", r.Xapi)
	}
	if text := control.Screen(&r, nil); !strings.Contains(text, "does NOT answer") {
		t.Errorf("the screen does not say so:\n%s", text)
	}
	if err := w.host.Resume(); err != nil {
		t.Fatal(err)
	}
}
