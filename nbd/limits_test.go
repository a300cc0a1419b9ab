package nbd

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/nbd/wire"
)

// New limits hold for who comes, and end nobody who is there.
func TestSetLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		a, b := s.negotiated("a"), s.negotiated("b")
		s.SetLimits(Limits{MaxConns: 1, IdleTimeout: time.Minute})
		a.reads(0, 512)
		b.reads(0, 512)
		c := s.connect()
		c.greet(fixedNoZeroes)
		if text := c.refused(wire.OptGo, infoRequest("c"), wire.RepErrPolicy); !strings.Contains(text, "max_connections is 1") {
			t.Errorf("the third: got %q", text)
		}
		s.SetLimits(Limits{MaxConns: 3, IdleTimeout: time.Minute})
		c.goTo("c")
		a.reads(0, 512) // and waits with the new limit from now on
		begin := time.Now()
		wantHard(t, a.closed(), "idle")
		if got := time.Since(begin); got != time.Minute {
			t.Errorf("idle connection ended after %v, want a minute", got)
		}
	})
}

func TestSetLimitsOfHandshakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.SetLimits(Limits{HandshakeTimeout: 3 * time.Second, FirstRequestTimeout: 5 * time.Second})
		begin := time.Now()
		silent, negotiated := s.connect(), s.negotiated("a")
		silent.receive(wire.GreetingLen)
		wantHard(t, silent.closed(), "handshake timeout")
		if got := time.Since(begin); got != 3*time.Second {
			t.Errorf("handshake: ended after %v", got)
		}
		wantHard(t, negotiated.closed(), "not a single request")
		if got := time.Since(begin); got != 5*time.Second {
			t.Errorf("first request: ended after %v", got)
		}
	})
}

// Requests that wait for the budget get it when there is more.
func TestSetLimitsGrowsTheBudget(t *testing.T) {
	const length = 512 << 10
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.MaxInflightBytes = 1 << 20
		h := newHold(t)
		d := newDevice(1 << 20)
		d.onRead = h.read
		s.serve(d)
		p := s.negotiated("a")
		go func() { // ends when the server has read them all
			for i := range 4 {
				p.read(uint64(i), 0, length)
			}
		}()
		advance(time.Second)               // readers that are stuck are relieved
		if n, _ := d.meter.now(); n != 1 { // half of it is for others
			t.Errorf("reads under way: got %d, want 1", n)
		}
		s.SetLimits(Limits{MaxInflightBytes: 8 << 20})
		advance(time.Second)
		if n, _ := d.meter.now(); n != 4 {
			t.Errorf("reads under way with a larger budget: got %d, want 4", n)
		}
		h.release()
		p.receive(4 * (wire.SimpleReplyLen + length))
		p.disc()
		p.closed()
	})
}
