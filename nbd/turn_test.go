package nbd

import (
	"net"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/nbd/wire"
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

// Storage takes its time, and reads of one connection overlap on it, whatever
// their sizes: 16 of them take as long as one, and a little for finding out that
// the device is slow.
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
					want += 3 * reliefEvery
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

// Of long reads that have arrived together one is copied while the other is, and
// short ones are served in turn: they are not worth waking a thread for.
func TestLongReadsShareTheTurn(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	for length, together := range map[int]bool{worthSharing / 2: false, worthSharing: true} {
		synctest.Test(t, func(t *testing.T) {
			took := reliefEvery / 3 // nobody is relieved
			s := sleepyServer(t, &took)
			p := s.negotiated("a")
			begin := time.Now()
			p.readMany(2, length)
			if err := p.answers(2, length); err != nil {
				t.Fatal(err)
			}
			want := 2 * took
			if together {
				want = took
			}
			if waited := time.Since(begin); waited != want {
				t.Errorf("2 reads of %d bytes took %v, want %v", length, waited, want)
			}
			synctest.Wait()
			if n := s.sharing.Load(); n != 0 {
				t.Errorf("%d turns count as given away when nothing is read", n)
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
			s.relief.mu.Lock()
			defer s.relief.mu.Unlock()
			for x := range s.relief.transmissions {
				return x.turn.slow.Load()
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
func TestReaderIsRelievedWhileItSends(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, held, all := budgetServer(t, 0)
		held.release()
		p := s.negotiated("a")
		p.read(0, 0, 512)
		for i := range 20 {
			advance(10 * reliefEvery)
			p.read(uint64(i+1), (i+1)*512, 512) // would block for ever on a server that only sends
		}
		advance(10 * reliefEvery)
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

// Replies to requests that came together leave together; one that is alone leaves
// at once.
func TestShortRepliesLeaveTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		var rec *recordingConn
		p := s.connectBy(func(nc net.Conn) net.Conn {
			rec = &recordingConn{Conn: nc}
			return rec
		})
		p.greet(fixedNoZeroes)
		p.goTo("a")
		before := len(rec.writes)
		const n, length = 64, 512
		p.readMany(n, length)
		if err := p.answers(n, length); err != nil {
			t.Fatal(err)
		}
		perWrite := maxPending / (wire.SimpleReplyLen + length)
		if got, want := len(rec.writes)-before, (n+perWrite-1)/perWrite; got != want {
			t.Errorf("%d replies in %d writes, want %d", n, got, want)
		}
		before = len(rec.writes)
		p.reads(0, length)
		if got := len(rec.writes) - before; got != 1 {
			t.Errorf("one reply in %d writes", got)
		}
		p.disc()
		p.closed()
	})
}

// Whoever looks after readers does not outlive the requests.
func TestReliefGoesHome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		p := s.negotiated("a")
		p.reads(0, 512)
		looks := func() bool {
			s.relief.mu.Lock()
			defer s.relief.mu.Unlock()
			return s.relief.stop != nil
		}
		if !looks() {
			t.Error("nobody looks after a connection that reads")
		}
		advance((reliefRests + 2) * reliefEvery)
		if looks() {
			t.Error("somebody looks after a connection that does nothing")
		}
		p.reads(0, 512)
		if !looks() {
			t.Error("nobody came back")
		}
		p.disc()
		p.closed()
		synctest.Wait()
		if looks() {
			t.Error("somebody looks after no connection at all")
		}
	})
}

// Whoever the relief is woken for is away by then. Were it the other way round, the
// relief could look, find nobody and go home, and a slow read would hold up those
// behind it.
func TestReliefIsWokenInTime(t *testing.T) {
	server := &Server{}
	tr := &transmission{c: &conn{srv: server}}
	r := &server.relief
	r.mu.Lock() // wake waits for it, having said that it is there
	woken := make(chan struct{})
	go func() {
		defer close(woken)
		tr.goAway(fetching)
	}()
	for !r.busy.Load() {
		runtime.Gosched()
	}
	away := tr.turn.away.Load()
	r.mu.Unlock()
	<-woken
	r.mu.Lock()
	r.goHome()
	r.mu.Unlock()
	if away == 0 {
		t.Error("the relief is woken before the reader goes away")
	}
}
