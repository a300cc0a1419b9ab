package nbd

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

const mib = 1 << 20

// TestBudgetLeavesRoomForProgress: while any number of connections hold all memory that they can
// get, the next one is served at once, and if it makes progress it gets memory for more than
// one request at a time.
func TestBudgetLeavesRoomForProgress(t *testing.T) {
	tests := []struct {
		name    string
		holders int
		phase   phase
		device  func(n int) string
		first   bool // the holders have made progress before they stop
		least   int64
	}{
		{"64 stalled peers", 64, withPeer, func(int) string { return "disk" }, false, 8 * mib},
		{"64 stalled peers of many disks", 64, withPeer, func(n int) string { return fmt.Sprint(n) }, false, 8 * mib},
		{"stalled disk with 32 connections", 32, atDevice, func(int) string { return "stalled" }, false, 8 * mib},
		{"stalled disk with 32 connections that were fast", 32, atDevice, func(int) string { return "stalled" }, true, 8 * mib},
		{"4 stalled disks with 8 fast connections each", 32, atDevice, func(n int) string { return fmt.Sprint("stalled", n/8) }, true, 2 * mib},
		{"6 fast peers that stop", 6, withPeer, func(int) string { return "disk" }, true, 2 * mib},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newByteBudget(64 * mib)
				var holders []*budgetClient
				for n := range tt.holders {
					c := newClient(b, tt.device(n), fmt.Sprint(n))
					if tt.first {
						c.meter.moved += 100 * mib
						time.Sleep(measureEvery)
						c.asks(1, 2*mib, tt.phase)
						c.moves()
					}
					holders = append(holders, c)
				}
				for _, c := range holders {
					if c.asks(10, 2*mib, tt.phase) == 0 {
						t.Errorf("connection %s: the first request waits", c.name)
					}
				}
				checkBudget(t, b)
				honest := newClient(b, "disk", "honest")
				if honest.asks(1, 2*mib, atDevice) != 1 {
					t.Fatal("the first request waits")
				}
				honest.moves()
				if least := honest.runs(3*time.Second, withPeer); least < tt.least {
					t.Errorf("a connection with progress had %d KiB in flight at the least, want %d", least>>10, tt.least>>10)
				}
				checkBudget(t, b)
				honest.drops()
				for _, c := range holders {
					c.drops()
				}
				if b.used != 0 {
					t.Errorf("%d bytes are used when nothing is in service", b.used)
				}
			})
		})
	}
}

// A peer that reads 128 KiB/s may hold memory that others do not use, but not in the half
// that is reserved for others.
func TestBudgetOfSlowPeers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newByteBudget(64 * mib)
		var slow []*budgetClient
		for n := range 32 {
			slow = append(slow, newClient(b, "disk", fmt.Sprint(n)))
		}
		for range 20 { // seconds
			for _, c := range slow {
				c.asks(10, 2*mib, withPeer)
				c.meter.moved += 128 << 10
			}
			time.Sleep(time.Second)
		}
		if b.used > b.size/2 {
			t.Errorf("slow peers hold %d MiB, want %d at most", b.used/mib, b.size/2/mib)
		}
		honest := newClient(b, "disk", "honest")
		if least := honest.runs(3*time.Second, withPeer); least < 8*mib {
			t.Errorf("a fast connection had %d KiB in flight at the least, want 8 MiB", least>>10)
		}
		for _, c := range slow {
			if c.cuts != 0 {
				t.Errorf("a slow peer that makes progress was cut")
			}
		}
	})
}

// TestBudgetClosesStuckConnections: connections that hold memory without progress are closed
// while others need it, the largest first, and no more than necessary. Not closed are those
// that wait for their device, make any progress, or whose progress is not known.
func TestBudgetClosesStuckConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newByteBudget(56 * mib)
		fast := func(device, name string, requests int, p phase) *budgetClient {
			c := newClient(b, device, name)
			c.meter.moved += 100 * mib
			time.Sleep(measureEvery)
			c.measure(time.Now())
			if got := c.asks(requests, 2*mib, p); got == 0 {
				t.Fatalf("%s: no request begins", name)
			}
			return c
		}
		stalled := fast("disk", "stalled", 10, withPeer)
		drip := fast("disk", "drip", 2, withPeer)
		unseen := fast("disk", "unseen", 1, withPeer)
		unseen.meter.unknown = true
		device := fast("sick", "waits for its device", 1, atDevice)
		little := fast("disk", "little", 1, withPeer)
		needy := newClient(b, "disk", "needy")
		others := []*budgetClient{drip, unseen, device, little, needy}
		for begin := time.Now(); time.Since(begin) < stuckAfter; time.Sleep(time.Second) {
			drip.meter.moved++
			if needy.asks(20, 2*mib, withPeer) == 0 {
				t.Fatal("the first request waits")
			}
			if stalled.cuts != 0 {
				t.Fatalf("cut after %v", time.Since(begin))
			}
			needy.drops()
		}
		for range 3 {
			needy.asks(20, 2*mib, withPeer)
			needy.drops()
			time.Sleep(time.Second)
		}
		if stalled.cuts != 1 {
			t.Errorf("the stalled one was cut %d times, want once", stalled.cuts)
		}
		for _, c := range others {
			if c.cuts != 0 {
				t.Errorf("%s was cut", c.name)
			}
		}
	})
}

// TestBudgetClosesNothingWithoutShortage: without a shortage no connection is closed.
func TestBudgetClosesNothingWithoutShortage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newByteBudget(64 * mib)
		stalled := newClient(b, "disk", "stalled")
		stalled.asks(4, 2*mib, withPeer)
		other := newClient(b, "disk", "other")
		for range 100 {
			other.asks(4, 2*mib, withPeer)
			time.Sleep(time.Second)
			other.drops()
		}
		if stalled.cuts != 0 {
			t.Error("cut although there is room")
		}
	})
}

// TestBudgetCountsOnlyTheWaitForThePeer: a peer's time starts when the server waits for it.
func TestBudgetCountsOnlyTheWaitForThePeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newByteBudget(8 * mib)
		c := newClient(b, "disk", "c")
		needy := newClient(b, "disk", "needy")
		needs := func() {
			needy.asks(4, 2*mib, withPeer)
			needy.drops()
			time.Sleep(time.Second)
		}
		for range 3 { // its first request is with the device for long
			c.asks(1, 4*mib, atDevice)
			for range 12 {
				needs()
			}
			c.move(&c.grants[0], withPeer)
			for range 8 {
				needs()
			}
			c.drops()
			for range 8 {
				needs()
			}
		}
		if c.cuts != 0 {
			t.Error("cut for the time of its device")
		}
	})
}

// Random requests of many connections: the counters agree with the grants, no first request
// waits, and every request that waits is granted in the end.
func TestBudgetWithRandomRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		chance := rand.New(rand.NewPCG(3, 4))
		b := newByteBudget(16 * mib)
		clients := make([]*budgetClient, 12)
		for n := range clients {
			clients[n] = newClient(b, fmt.Sprint(n%3), fmt.Sprint(n))
		}
		for range 20000 {
			c := clients[chance.IntN(len(clients))]
			switch chance.IntN(4) {
			case 0, 1:
				bytes := int64(1) << chance.IntN(25)
				idle := len(c.grants) == 0
				n := c.asks(1, bytes, phase(chance.IntN(2)))
				if idle && n == 0 {
					t.Fatalf("a first request of %d bytes waits", bytes)
				}
				if n > 0 && c.grants[len(c.grants)-1].memory == inBudget && b.used > b.size {
					t.Fatalf("%d bytes are used of %d", b.used, b.size)
				}
			case 2:
				if len(c.grants) > 0 {
					c.move(&c.grants[0], phase(chance.IntN(2)))
				}
			default:
				if len(c.grants) > 0 {
					c.moves()
				}
			}
			if chance.IntN(100) == 0 { // also to less than is in use
				b.resize(int64(1+chance.IntN(16)) * 16 * mib)
			}
			checkBudget(t, b)
			if n := slices.IndexFunc(clients, func(c *budgetClient) bool { return c.n != len(c.grants) }); n >= 0 {
				t.Fatalf("connection %d counts %d requests, has %d", n, clients[n].n, len(clients[n].grants))
			}
		}
	})
}

// TestBudgetQueue: a waiting request gets memory as soon as there is some, and at once if its
// connection has no other request in flight, independent of the requests before it in the
// queue.
func TestBudgetQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newByteBudget(8 * mib)
		wait := func(c *budgetClient, bytes int64) <-chan grant {
			got := make(chan grant, 1)
			go func() {
				g, err := c.begin(context.Background(), bytes, withPeer)
				if err != nil {
					t.Error(err)
				}
				got <- g
			}()
			synctest.Wait()
			return got
		}
		first, second := newClient(b, "disk", "first"), newClient(b, "disk", "second")
		first.asks(2, 2*mib, withPeer)  // all of the first half
		second.asks(1, 2*mib, withPeer) // in pieces
		a, z := wait(first, 2*mib), wait(second, 2*mib)
		select {
		case g := <-a:
			t.Errorf("got %+v at once", g)
		case g := <-z:
			t.Errorf("got %+v at once", g)
		default:
		}
		second.moves()
		synctest.Wait()
		g := <-z
		second.end(g)
		first.moves()
		if g := <-a; g.memory != inBudget {
			t.Errorf("got %+v, want memory of the budget", g)
		}
	})
}

func TestRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r rate
		total := int64(1000) // before the first note
		note := func(n int64) {
			total += n
			r.note(total, time.Now())
		}
		note(0)
		if r.perSecond() != 0 {
			t.Errorf("got %d a second at the beginning", r.perSecond())
		}
		time.Sleep(100 * time.Millisecond)
		if note(500); r.perSecond() != 500 {
			t.Errorf("got %d, want what came within this second", r.perSecond())
		}
		time.Sleep(900 * time.Millisecond)
		note(0)
		time.Sleep(500 * time.Millisecond)
		if note(100); r.perSecond() != 500 {
			t.Errorf("got %d, want what came within the last second", r.perSecond())
		}
		time.Sleep(16 * time.Second)
		if note(1550); r.perSecond() != 100 {
			t.Errorf("got %d, want the mean of the long time", r.perSecond())
		}
	})
}
