package nbd

import (
	"runtime"
	"testing"
	"testing/synctest"
	"time"
)

// advance lets fake time pass, and everything happen that was due.
func advance(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

// sleepyServer has a device that takes d for each read, until that is changed.
func sleepyServer(t *testing.T, d *time.Duration) *testServer {
	s := newTestServer(t)
	dev := newDevice(64 << 20)
	dev.onRead = func(p []byte, off int64) (int, error) {
		time.Sleep(*d) // in the bubble's time
		pattern(p, off)
		return len(p), nil
	}
	s.serve(dev)
	return s
}

// TestReadsOverlapOnASlowDevice: the reads of one connection overlap on slow storage, with any
// lengths: 16 of them take as long as one, and a little for finding out that the device is
// slow.
func TestReadsOverlapOnASlowDevice(t *testing.T) {
	for _, length := range []int{4096, 256 << 10, 2 << 20} {
		synctest.Test(t, func(t *testing.T) {
			took := 50 * time.Millisecond
			s := sleepyServer(t, &took)
			p := s.negotiated("a")
			for round := range 3 {
				begin := time.Now()
				p.readMany(16, length)
				if err := p.answers(16, length); err != nil {
					t.Fatal(err)
				}
				want := took
				if round == 0 {
					want += 3 * stallTime
				}
				if waited := time.Since(begin); waited > want {
					t.Errorf("16 reads of %d bytes, round %d: took %v, want %v at most", length, round, waited, want)
				}
			}
			p.disc()
			p.closed()
		})
	}
}

// A device that has become fast again is served without hand-overs again, and
// one that becomes slow is noticed again.
func TestSlowAndFastAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		took := 10 * time.Millisecond
		s := sleepyServer(t, &took)
		p := s.negotiated("a")
		slow := func() bool {
			s.stalls.mu.Lock()
			defer s.stalls.mu.Unlock()
			for x := range s.stalls.transmissions {
				return x.token.slow.Load()
			}
			t.Fatal("no transmission")
			return false
		}
		p.reads(0, 4096)
		if !slow() {
			t.Error("a device of 10 ms counts as fast")
		}
		took = 0
		for i := range fastRun {
			p.reads(i*4096, 4096)
		}
		if slow() {
			t.Errorf("still slow after %d reads that took no time", fastRun)
		}
		took = 10 * time.Millisecond
		p.reads(0, 4096)
		if !slow() {
			t.Error("slow again, and not noticed")
		}
		p.disc()
		p.closed()
	})
}

// A client may send on and on without taking replies; its requests are read all
// the same, within the budget.
func TestRequestsAreReadWhileRepliesAreBlocked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, held, all := budgetServer(t, 0)
		held.release()
		p := s.negotiated("a")
		p.read(0, 0, 512)
		for i := range 20 {
			advance(10 * stallTime)
			p.read(uint64(i+1), (i+1)*512, 512) // would block for ever on a server that only sends
		}
		advance(10 * stallTime)
		if all.reads != 21 {
			t.Errorf("%d reads were done, want 21", all.reads)
		}
		if err := p.answers(21, 512); err != nil {
			t.Error(err)
		}
		p.disc()
		p.closed()
	})
}

// The stall monitor runs only while there are requests.
func TestStallMonitorStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		p := s.negotiated("a")
		p.reads(0, 512)
		runs := func() bool {
			s.stalls.mu.Lock()
			defer s.stalls.mu.Unlock()
			return s.stalls.stop != nil
		}
		if !runs() {
			t.Error("no monitor for a connection that reads")
		}
		advance((idleLooks + 2) * stallTime)
		if runs() {
			t.Error("a monitor for a connection that does nothing")
		}
		p.reads(0, 512)
		if !runs() {
			t.Error("the monitor did not start again")
		}
		p.disc()
		p.closed()
		synctest.Wait()
		if runs() {
			t.Error("a monitor for no connection at all")
		}
	})
}

// The reader is marked as blocked before the monitor is woken. Were it the other way
// round, the monitor could look, see no request and stop, and a slow read would delay
// the requests after it.
func TestStallMonitorIsWokenInTime(t *testing.T) {
	server := &Server{}
	tr := &transmission{c: &conn{srv: server}}
	m := &server.stalls
	m.mu.Lock() // wake waits for it after it has set active
	woken := make(chan struct{})
	go func() {
		defer close(woken)
		tr.beginBlocking(inFetch)
	}()
	for !m.active.Load() {
		runtime.Gosched()
	}
	blocked := tr.token.blocked.Load()
	m.mu.Unlock()
	<-woken
	m.mu.Lock()
	m.halt()
	m.mu.Unlock()
	if blocked == 0 {
		t.Error("the monitor is woken before the reader is marked as blocked")
	}
}
