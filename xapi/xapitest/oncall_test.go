package xapitest

import (
	"slices"
	"sync"
	"testing"
)

// points records the calls of the OnCall function.
type points struct {
	mu   sync.Mutex
	seen []CallPoint
}

func (p *points) add(c CallPoint) Verdict {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.seen = append(p.seen, c)
	return Proceed
}

func (p *points) want(t *testing.T, want ...CallPoint) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if !slices.Equal(p.seen, want) {
		t.Errorf("got %+v, want %+v", p.seen, want)
	}
}

func TestOnCall(t *testing.T) {
	h := start(t, Config{})
	s := h.NewSession(RoleRoot)
	var first, second points
	h.OnCall(first.add)
	must(t, h, "session.get_uuid", s, s)
	mustFail(t, h, []string{"MESSAGE_METHOD_UNKNOWN", "x"}, "x", s)
	h.OnCall(second.add) // counts anew
	must(t, h, "pool.get_all", s)
	h.OnCall(nil)
	must(t, h, "pool.get_all", s)
	first.want(t, CallPoint{1, "session.get_uuid", false}, CallPoint{1, "session.get_uuid", true},
		CallPoint{2, "x", false}, CallPoint{2, "x", true})
	second.want(t, CallPoint{1, "pool.get_all", false}, CallPoint{1, "pool.get_all", true})
}

// TestOnCallBreaks breaks a VBD.create at each of its points, in each way.
func TestOnCallBreaks(t *testing.T) {
	for name, breakIt := range map[string]func(h *Host) Verdict{
		"drop":    func(*Host) Verdict { return Drop },
		"restart": func(h *Host) Verdict { h.Restart(); return Proceed },
		"stop":    func(h *Host) Verdict { h.Stop(); return Drop },
	} {
		for _, after := range []bool{false, true} {
			t.Run(name+map[bool]string{false: " before", true: " after"}[after], func(t *testing.T) {
				h := start(t, Config{})
				s := h.NewSession(RoleRoot)
				st := vbdStruct(t, h, s, addVDI(t, h, VDISpec{}))
				seen := make(chan CallPoint, 3)
				h.OnCall(func(c CallPoint) Verdict {
					seen <- c
					if c.After != after {
						return Proceed
					}
					return breakIt(h)
				})
				mustDrop(t, h, "VBD.create", s, st)
				if got := len(h.VBDs()); (got == 1) != after {
					t.Errorf("got %d VBDs", got)
				}
				want := []CallPoint{{1, "VBD.create", false}, {1, "VBD.create", true}}
				if name != "restart" && !after {
					want = want[:1]
				}
				for _, want := range want { // the last may come after the connection broke
					if got := <-seen; got != want {
						t.Errorf("got %+v, want %+v", got, want)
					}
				}
				if len(seen) != 0 {
					t.Errorf("got %+v as well", <-seen)
				}
				h.OnCall(nil)
				if err := h.Resume(); err != nil {
					t.Fatal(err)
				}
				must(t, h, "VBD.create", h.NewSession(RoleRoot), st)
			})
		}
	}
}

// TestOnCallUsesHost calls methods that lock the host at both points.
func TestOnCallUsesHost(t *testing.T) {
	h := start(t, Config{})
	s := h.NewSession(RoleRoot)
	ref := createVBD(t, h, s, addVDI(t, h, VDISpec{}))
	h.OnCall(func(c CallPoint) Verdict {
		if c.After {
			if err := h.DestroyVBD(t.Context(), h.VBDs()[0].UUID); err != nil {
				t.Error(err)
			}
		} else {
			h.Fail("VBD.plug", "OTHER") // meets this very call
		}
		return Proceed
	})
	mustFail(t, h, []string{"OTHER"}, "VBD.plug", s, ref)
	if got := h.VBDs(); len(got) != 0 {
		t.Errorf("got %+v, want the VBD destroyed", got)
	}
}

func TestOnCallWithFaults(t *testing.T) {
	h := start(t, Config{})
	s := h.NewSession(RoleRoot)
	var seen points
	h.OnCall(seen.add)
	h.Fail("session.get_uuid", "OTHER")
	mustFail(t, h, []string{"OTHER"}, "session.get_uuid", s, s)
	h.LoseReply("session.get_pool")
	mustDrop(t, h, "session.get_pool", s, s)
	h.DropConnection("session.get_tasks")
	mustDrop(t, h, "session.get_tasks", s, s)
	seen.want(t, CallPoint{1, "session.get_uuid", false}, CallPoint{1, "session.get_uuid", true},
		CallPoint{2, "session.get_pool", false}, CallPoint{2, "session.get_pool", true},
		CallPoint{3, "session.get_tasks", false})

	// A call that is dropped before it is executed uses up no fault.
	h.LoseReply("pool.get_all")
	h.OnCall(func(CallPoint) Verdict { return Drop })
	mustDrop(t, h, "pool.get_all", s)
	h.OnCall(nil)
	mustDrop(t, h, "pool.get_all", s)
	must(t, h, "pool.get_all", s)
}

// TestOnCallWithBlock: the first point comes before the call is held back.
func TestOnCallWithBlock(t *testing.T) {
	h := start(t, Config{})
	s := h.NewSession(RoleRoot)
	release := h.Block("pool.get_all")
	arrived := make(chan CallPoint, 2)
	h.OnCall(func(c CallPoint) Verdict { arrived <- c; return Proceed })
	done := make(chan error, 1)
	go func() {
		_, _, err := try(t, h, "pool.get_all", s)
		done <- err
	}()
	if got := <-arrived; got.After {
		t.Errorf("got %+v first", got)
	}
	if len(arrived) != 0 {
		t.Error("the call was not held back")
	}
	release()
	if got := <-arrived; !got.After {
		t.Errorf("got %+v second", got)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestOnCallForgotten: a call that a restart ended has no second point.
func TestOnCallForgotten(t *testing.T) {
	h := start(t, Config{})
	release := h.Block(loginMethod)
	var seen points
	h.OnCall(seen.add)
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
	_ = h.Close() // waits for the call
	seen.want(t, CallPoint{1, loginMethod, false})
}
