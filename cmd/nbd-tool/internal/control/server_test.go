package control

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"xapi-nbd/test/leaks"
)

func TestMain(m *testing.M) { leaks.Main(m) }

// scripted is a mirror whose Wait returns when ctx or ended is done.
type scripted struct {
	waiting   chan struct{} // receives when Wait or Complete is called
	withdrawn chan struct{} // closed when the context of Wait is done
	ended     chan struct{}
	released  chan struct{} // closed when Complete may return
}

func (scripted) Status() *Status { return &Status{State: "copying"} }
func (scripted) Pause()          {}
func (scripted) Resume()         {}
func (s scripted) Complete(pivot, verify bool) error {
	s.waiting <- struct{}{}
	<-s.released
	return nil
}
func (scripted) Cancel() error { return errors.New("not now") }

func (s scripted) Wait(ctx context.Context) error {
	s.waiting <- struct{}{}
	select {
	case <-ctx.Done():
		close(s.withdrawn)
		return context.Cause(ctx)
	case <-s.ended:
		return errors.New("it has ended")
	}
}

// start serves a mirror until the end of the test.
func start(t *testing.T) (s *Server, m scripted, path string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "control") // t.TempDir may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path = filepath.Join(dir, "ctl")
	l, err := Listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	m = scripted{make(chan struct{}), make(chan struct{}), make(chan struct{}), make(chan struct{})}
	s = Serve(l, m, slog.New(slog.DiscardHandler))
	t.Cleanup(s.Close)
	return s, m, path
}

// TestLeavingController: closing the connection withdraws a wait, and no complete.
func TestLeavingController(t *testing.T) {
	_, m, path := start(t)
	ctx, leave := context.WithCancel(t.Context())
	var calls sync.WaitGroup
	for _, r := range []Request{{Command: CommandWait}, {Command: CommandComplete, Then: ThenStop}} {
		calls.Go(func() {
			if reply, err := Call(ctx, path, r); err == nil {
				t.Errorf("%s: got %+v, want an error", r.Command, reply)
			}
		})
		<-m.waiting
	}
	leave()
	calls.Wait()
	select {
	case <-m.withdrawn:
	case <-time.After(time.Minute):
		t.Error("the wait was not withdrawn within a minute")
	}
	close(m.released)
	if reply, err := Call(t.Context(), path, Request{Command: CommandCancel}); err != nil || reply.OK || reply.Error != "not now" || reply.Status.State != "copying" {
		t.Errorf("cancel: got %+v, %v", reply, err)
	}
}

// TestLastReply: a request whose mirror has ended gets its reply, although the server is closed.
func TestLastReply(t *testing.T) {
	s, m, path := start(t)
	replies := make(chan *Reply)
	go func() {
		reply, _ := Call(t.Context(), path, Request{Command: CommandWait})
		replies <- reply
	}()
	<-m.waiting
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		s.Close()
	}()
	close(m.ended)
	if reply := <-replies; reply == nil || reply.Error != "it has ended" {
		t.Errorf("got %+v", reply)
	}
	<-closed
	if _, err := os.Stat(path); err == nil {
		t.Error("the socket is left")
	}
	if _, err := Call(t.Context(), path, Request{Command: CommandStatus}); err == nil {
		t.Error("a closed server has answered")
	}
}

// TestAllowedUser: root and the user of the process control a mirror, and nobody else.
func TestAllowedUser(t *testing.T) {
	own := uint32(os.Geteuid())
	for uid, want := range map[uint32]bool{0: true, own: true, own + 1: false, 65534: false, 1<<32 - 1: false} {
		if err := allowedUser(uid); (err == nil) != want {
			t.Errorf("uid %d: got %v, want it to be allowed: %v", uid, err, want)
		}
	}
}
