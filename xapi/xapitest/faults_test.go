package xapitest

import (
	"io"
	"testing"
	"time"
)

func TestFail(t *testing.T) {
	h := start(t, Config{})
	s := h.NewSession(RoleRoot)
	h.FailAlways("session.get_uuid", "ALWAYS")
	h.Fail("session.get_uuid", "FIRST", "a", "b")
	h.Fail("session.get_uuid", "SECOND")
	mustFail(t, h, []string{"SESSION_INVALID", "x"}, "session.get_uuid", "x", s) // uses none up
	mustFail(t, h, []string{"FIRST", "a", "b"}, "session.get_uuid", s, s)
	mustFail(t, h, []string{"SECOND"}, "session.get_uuid", s, s)
	for range 2 {
		mustFail(t, h, []string{"ALWAYS"}, "session.get_uuid", s, s)
	}
	must(t, h, "session.get_originator", s, s)
	h.ClearFaults()
	must(t, h, "session.get_uuid", s, s)
}

func TestDelay(t *testing.T) {
	h := start(t, Config{})
	const delay = 30 * time.Millisecond
	h.Delay(loginMethod, delay)
	for range 2 {
		begin := time.Now()
		must(t, h, loginMethod, "", "")
		if took := time.Since(begin); took < delay {
			t.Errorf("took %v, want at least %v", took, delay)
		}
	}
}

func TestLoseReply(t *testing.T) {
	h := start(t, Config{})
	s := h.NewSession(RoleRoot)
	st := vbdStruct(t, h, s, addVDI(t, h, VDISpec{}))
	h.LoseReply("VBD.create")
	mustDrop(t, h, "VBD.create", s, st)
	if got := len(h.VBDs()); got != 1 {
		t.Errorf("got %d VBDs, want 1", got)
	}
	must(t, h, "VBD.create", s, st)
}

func TestDropConnection(t *testing.T) {
	h := start(t, Config{})
	s := h.NewSession(RoleRoot)
	st := vbdStruct(t, h, s, addVDI(t, h, VDISpec{}))
	h.ResetCalls()
	h.DropConnection("VBD.create")
	mustDrop(t, h, "VBD.create", s, st)
	if got := len(h.VBDs()); got != 0 || len(h.Calls()) != 1 {
		t.Errorf("got %d VBDs, calls %v, want 0 and the one that arrived", got, h.Calls())
	}
	must(t, h, "VBD.create", s, st)
}

func TestBooting(t *testing.T) {
	h := start(t, Config{})
	h.Booting(true)
	h.ClearFaults()
	mustFail(t, h, []string{"HOST_STILL_BOOTING"}, loginMethod, "", "")
	mustFail(t, h, []string{"HOST_STILL_BOOTING"}, "no such method")
	h.Booting(false)
	must(t, h, loginMethod, "", "")
}

// TestBrokenConnection: a call that reached the host is executed after its connection broke.
func TestBrokenConnection(t *testing.T) {
	for name, breakIt := range map[string]func(h *Host, c io.Closer){
		"client": func(_ *Host, c io.Closer) { _ = c.Close() },
		"stop":   func(h *Host, _ io.Closer) { h.Stop() },
		"drop":   func(h *Host, _ io.Closer) { h.DropConnections() },
		"xapi":   func(h *Host, _ io.Closer) { h.Restart() },
	} {
		t.Run(name, func(t *testing.T) {
			h := start(t, Config{})
			s := h.NewSession(RoleRoot)
			ref := createVBD(t, h, s, addVDI(t, h, VDISpec{}))
			reached, release := h.BlockWork("plug")
			defer release()
			conn := dial(t, h)
			if _, err := io.WriteString(conn, post(callBody("VBD.plug", s, ref))); err != nil {
				t.Fatal(err)
			}
			<-reached
			breakIt(h, conn)
			if h.VBDs()[0].CurrentlyAttached {
				t.Fatal("the call was not held back")
			}
			release()
			waitFor(t, h, func(vbds []VBD) bool { return vbds[0].CurrentlyAttached })
		})
	}
}

// TestRestartEndsLogin: no session may come from before a restart.
func TestRestartEndsLogin(t *testing.T) {
	h := start(t, Config{})
	release := h.Block(loginMethod)
	done := make(chan error, 1)
	go func() {
		_, _, err := try(t, h, loginMethod, "", "")
		done <- err
	}()
	waitCalls(t, h, 1)
	h.Restart()
	release()
	if err := <-done; err == nil {
		t.Error("got a reply, want a broken connection")
	}
	must(t, h, loginMethod, "", "")
	if got := h.Sessions(); got != 1 {
		t.Errorf("got %d sessions, want 1", got)
	}
}

func TestCloseEndsBlockedCalls(t *testing.T) {
	h := start(t, Config{})
	release := h.Block(loginMethod)
	done := make(chan error, 1)
	go func() {
		_, _, err := try(t, h, loginMethod, "", "")
		done <- err
	}()
	waitCalls(t, h, 1)
	if err := h.Close(); err != nil {
		t.Error(err)
	}
	if err := <-done; err == nil {
		t.Error("got a reply, want a broken connection")
	}
	release() // harmless after Close, and twice
	release()
}
