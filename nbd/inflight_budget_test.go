package nbd

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync"
	"testing"
	"testing/synctest"

	"xapi-nbd/nbd/wire"
)

// budgetServer has devices whose reads are held and counted together.
func budgetServer(t testing.TB, budget int64) (*testServer, *hold, *meter) {
	s := newTestServer(t)
	s.MaxInflightBytes = budget
	held, all := newHold(t), new(meter)
	s.exports.open = func(context.Context, Peer, string) (Device, error) {
		d := newDevice(16 << 20)
		d.meter, d.onRead = all, held.read
		return d, nil
	}
	return s, held, all
}

// readMany sends n requests of length bytes in one write, which the server
// takes whole even when it serves none of them.
func (p *peer) readMany(n, length int) {
	p.t.Helper()
	var b []byte
	for i := range n {
		b = append(b, readRequest(uint64(i), i*length, length)...)
	}
	p.send(b)
}

// answers receives n replies to readMany in any order.
func (p *peer) answers(n, length int) error {
	seen := make(map[uint64]bool)
	b := make([]byte, wire.SimpleReplyLen+length)
	for range n {
		if _, err := io.ReadFull(p.nc, b); err != nil {
			return err
		}
		r, err := wire.ParseSimpleReply((*[wire.SimpleReplyLen]byte)(b))
		if err != nil || r.Errno != wire.Success || seen[r.Cookie] {
			return fmt.Errorf("got reply %+v, error %w", r, err)
		}
		seen[r.Cookie] = true
		if !bytes.Equal(b[wire.SimpleReplyLen:], patternOf(int64(r.Cookie)*int64(length), length)) {
			return fmt.Errorf("wrong data in the reply with cookie %d", r.Cookie)
		}
	}
	return nil
}

func TestMaxInflight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, held, all := budgetServer(t, 0)
		s.MaxInflight = 3
		p := s.negotiated("a")
		p.readMany(10, 512)
		for range 7 {
			advance(10 * stallTime) // another reader is started
			if reading, _ := all.now(); reading != 3 {
				t.Fatalf("%d reads under way, want 3", reading)
			}
			held.one <- struct{}{}
			if err := p.answers(1, 512); err != nil {
				t.Fatal(err)
			}
		}
		other := s.negotiated("b") // the limit is one for each connection
		other.readMany(10, 512)
		advance(10 * stallTime)
		if reading, _ := all.now(); reading != 6 {
			t.Errorf("%d reads under way on two connections, want 6", reading)
		}
	})
}

// TestByteBudgetIsForAllConnections: the bytes in memory are limited for all connections
// together.
func TestByteBudgetIsForAllConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const budget, length, conns, each = 8 << 20, 512 << 10, 12, 12
		s, held, all := budgetServer(t, budget)
		var peers []*peer
		for range conns {
			p := s.negotiated("a")
			p.readMany(each, length)
			peers = append(peers, p)
		}
		advance(10 * stallTime)
		// The first half is in use, and the other connections have their reserves.
		const want = budget/2 + (conns-budget/2/length)*reserveSize
		if _, bytes := all.now(); bytes != want {
			t.Errorf("%d bytes being read, want %d", bytes, want)
		}
		if got := inFlight(s); got != want {
			t.Errorf("%d bytes in flight by the status, want %d", got, want)
		}
		held.release()
		var wg sync.WaitGroup
		for _, p := range peers {
			wg.Go(func() {
				if err := p.answers(each, length); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if all.maxBytes > budget+conns*reserveSize || all.finished != conns*each*length {
			t.Errorf("at most %d bytes at a time, %d in all; want %d and %d", all.maxBytes, all.finished, budget+conns*reserveSize, conns*each*length)
		}
		synctest.Wait()
		if got := inFlight(s); got != 0 {
			t.Errorf("%d bytes in flight by the status when all is answered", got)
		}
	})
}

// inFlight returns the bytes in flight of all connections, as the server reports them.
func inFlight(s *testServer) (bytes int64) {
	for _, c := range s.Conns() {
		bytes += c.InFlightBytes
	}
	return bytes
}

// TestByteBudgetHoldsUntilTheReplyIsSent: replies that a peer does not read count too.
func TestByteBudgetHoldsUntilTheReplyIsSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const length = 512 << 10 // the first half
		s, held, all := budgetServer(t, 2*length)
		p := s.negotiated("a")
		p.readMany(5, length)
		advance(10 * stallTime) // from now on each read gets a goroutine of its own
		held.release()
		synctest.Wait()
		if all.reads != 1 {
			t.Errorf("%d reads were done for a peer that takes no replies, want 1", all.reads)
		}
		if err := p.answers(5, length); err != nil {
			t.Error(err)
		}
	})
}

// A request that is larger than the budget passes through the reserve of its
// connection, and does not delay other connections.
func TestRequestAboveTheBudgetIsServedInPieces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, held, all := budgetServer(t, 1<<20)
		big, small := s.negotiated("a"), s.negotiated("b")
		big.read(0, 0, 4<<20)
		synctest.Wait()
		if reading, bytes := all.now(); reading != 1 || bytes != reserveSize {
			t.Errorf("%d reads of %d bytes under way, want a piece of %d", reading, bytes, reserveSize)
		}
		held.release()
		synctest.Wait()
		small.readMany(4, 512)
		if err := small.answers(4, 512); err != nil {
			t.Error(err)
		}
		if errno := big.answer(0, 0, 4<<20); errno != wire.Success {
			t.Error(errno)
		}
		if all.maxBytes > 2*reserveSize {
			t.Errorf("%d bytes were read at one time", all.maxBytes)
		}
	})
}

// Requests that wait for the budget end with their connection, and free all of it.
func TestBudgetIsGivenBack(t *testing.T) {
	ends := map[string]func(s *testServer, p *peer){
		"hung up":   func(_ *testServer, p *peer) { p.nc.Close() },
		"timed out": func(*testServer, *peer) { advance(defaults.WriteTimeout) },
	}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, held, all := budgetServer(t, 1<<20)
				p := s.negotiated("a")
				p.readMany(20, 512<<10)
				held.release()
				synctest.Wait()
				end(s, p)
				p.end()
				if s.budget.used != 0 || len(s.budget.queue) != 0 || len(s.budget.conns) != 0 {
					t.Errorf("%d bytes, %d waiters and %d connections are left", s.budget.used, len(s.budget.queue), len(s.budget.conns))
				}
				if reading, bytes := all.now(); reading != 0 || bytes != 0 {
					t.Errorf("%d reads of %d bytes are left", reading, bytes)
				}
			})
		})
	}
}
