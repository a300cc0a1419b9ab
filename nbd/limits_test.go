package nbd

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/nbd/wire"
)

// defaults are the limits of a Server whose user sets none.
var defaults = Limits{}.withDefaults()

// New limits apply to new connections, and end no connection.
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
		if got := time.Since(begin) - farewellTime; got != time.Minute {
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
		if got := time.Since(begin) - farewellTime; got != 5*time.Second {
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
		advance(time.Second)               // the stall monitor starts another reader
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

// A higher MaxHandshakes admits the connections that wait.
func TestSetLimitsAdmitsWaitingConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.MaxHandshakes = 1
		first := s.connect()
		first.receive(wire.GreetingLen)
		second := s.connect()
		greeted := make(chan struct{})
		go func() { // ends when the second connection is admitted
			defer close(greeted)
			second.receive(wire.GreetingLen)
		}()
		synctest.Wait()
		select {
		case <-greeted:
			t.Error("the second connection was admitted above the limit")
		default:
		}
		s.SetLimits(Limits{MaxHandshakes: 2})
		synctest.Wait()
		select {
		case <-greeted:
		default:
			t.Error("the second connection was not admitted at once")
		}
		first.nc.Close()
		second.nc.Close()
		<-greeted
	})
}

// Other limits apply to the connections that come after SetLimits.
func TestSetLimitsOfNewConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.SetLimits(Limits{MaxInflight: 1, MaxHandshakeBytes: 10})
		if got := newTransmission(newConn(&s.Server, nowhere{}, "x"), &session{device: newDevice(1)}).inflight.maxRequests; got != 1 {
			t.Errorf("requests in flight: limit %d, want 1", got)
		}
		p := s.connect()
		p.greet(fixedNoZeroes)
		wantHard(t, p.closed(), "too many bytes in one handshake")
	})
}

// The fields of a Server belong to its user: the defaults are not written there.
func TestServerDoesNotWriteItsFields(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		want := Limits{MaxConns: 7}
		s.Limits, s.Logger = want, nil
		s.negotiated("a").disc()
		s.shutdown()
		if s.Limits != want || s.Logger != nil {
			t.Errorf("got limits %+v and logger %v", s.Limits, s.Logger)
		}
	})
}
