package nbd

import (
	"context"
	"crypto/tls"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
)

// silent starts n connections of an address that are greeted and say nothing.
func silent(s *testServer, host string, n int) []*peer {
	s.t.Helper()
	var peers []*peer
	for range n {
		p := s.connectFrom(host)
		p.receive(wire.GreetingLen)
		peers = append(peers, p)
	}
	synctest.Wait()
	return peers
}

// wantOpen expects that so many of the connections are open.
func wantOpen(t testing.TB, what string, peers []*peer, want int) {
	t.Helper()
	got := 0
	for _, p := range peers {
		if p.open() {
			got++
		}
	}
	if got != want {
		t.Errorf("%s: %d of %d connections are open, want %d", what, got, len(peers), want)
	}
}

// A backup server opens all its disks at once: no handshake is ended because of another one.
func TestManyHandshakesOfOneAddress(t *testing.T) {
	connections := 3 * defaults.MaxHandshakesPerHost
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		var wg sync.WaitGroup
		for range connections {
			p := s.connectFrom("192.0.2.1")
			wg.Go(func() {
				p.greet(fixedNoZeroes)
				time.Sleep(evictAfter - time.Millisecond) // far away
				p.goTo("a")
			})
		}
		wg.Wait()
		if got := len(s.exports.opened()); got != connections {
			t.Errorf("%d of %d connections got their export", got, connections)
		}
	})
}

// Connections that wait for the program (a plug, say) do not count as negotiating
// and are not ended, however many they are and however they ask.
func TestWaitingForTheProgramDoesNotCount(t *testing.T) {
	host, connections := "192.0.2.1", defaults.MaxHandshakesPerHost*3/2
	for _, opt := range []wire.Option{wire.OptInfo, wire.OptGo, wire.OptSetMetaContext} {
		t.Run(opt.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t)
				s.MaxHandshakes = connections / 2
				s.TLSPolicy = func(context.Context, Peer) (TLSMode, error) {
					time.Sleep(3 * time.Second)
					return NoTLS, nil
				}
				s.exports.open = func(context.Context, Peer, string) (Device, error) {
					time.Sleep(5 * time.Second)
					return newDevice(512), nil
				}
				var wg sync.WaitGroup
				for range connections {
					p := s.connectFrom(host)
					wg.Go(func() {
						p.greet(fixedNoZeroes)
						if opt == wire.OptSetMetaContext {
							p.option(wire.OptStructuredReply, nil)
							p.want(wire.OptStructuredReply, wire.RepAck)
							p.option(opt, wire.MetaContextRequest{Export: "a"}.Append(nil))
							p.want(opt, wire.RepAck)
							return
						}
						p.info(opt, "a")
					})
				}
				begin := time.Now()
				wg.Wait()
				if took := time.Since(begin); took != 8*time.Second {
					t.Errorf("the last one was answered after %v, want 8s", took)
				}
			})
		})
	}
}

// The connection for whose peer the server has waited longest makes room for a new connection
// of the same address. No other connection is closed.
func TestSilentConnectionsMakeRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		stranger := silent(s, "2001:db8::1", 1)
		advance(time.Hour / 1000)
		oldest := silent(s, "192.0.2.1", 1)
		advance(time.Millisecond)
		others := silent(s, "192.0.2.1", defaults.MaxHandshakesPerHost-1)
		advance(evictAfter - 2*time.Millisecond)
		early := silent(s, "192.0.2.1", 1)
		wantOpen(t, "before a second is over", slices.Concat(stranger, oldest, others, early), 2+len(others)+1)
		advance(time.Millisecond)
		late := silent(s, "192.0.2.1", 1)
		wantHard(t, oldest[0].closed(), "made room")
		wantOpen(t, "after a second", slices.Concat(stranger, others, early, late), 1+len(others)+2)
	})
}

// The time that a peer takes counts in all: bytes that come one by one do not keep
// a connection from making room.
func TestSlowConnectionsMakeRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		slow := s.connectFrom("192.0.2.1")
		slow.greet(fixedNoZeroes)
		for range 4 {
			time.Sleep(evictAfter / 4)
			slow.refused(wire.OptList, nil, wire.RepErrPolicy)
		}
		silent(s, "192.0.2.1", defaults.MaxHandshakesPerHost)
		wantHard(t, slow.closed(), "made room")
	})
}

// One address cannot take all the room: at the limit a new connection waits, those
// of addresses with few connections come first, and those of the address with the
// most make room, as soon as they have kept the server waiting for long enough.
func TestManySilentConnectionsMakeRoom(t *testing.T) {
	const flood = "192.0.2.1"
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		honest := []*peer{s.connectFrom("192.0.2.2")}
		honest[0].greet(fixedNoZeroes)
		advance(evictAfter) // is no reason to end it
		inside := silent(s, flood, defaults.MaxHandshakes-1)
		var queued []*peer
		for range 100 {
			queued = append(queued, s.connectFrom(flood))
		}
		synctest.Wait()
		begin := time.Now()
		late := s.connectFrom("192.0.2.3")
		late.greet(fixedNoZeroes)
		late.goTo("a")
		if took := time.Since(begin); took != evictAfter {
			t.Errorf("served after %v, want %v", took, evictAfter)
		}
		synctest.Wait()
		wantOpen(t, "of the address with few", honest, 1)
		wantOpen(t, "of the address with many", inside, len(inside)-len(queued)-1)
		honest[0].goTo("a")
		for _, p := range queued {
			p.receive(wire.GreetingLen)
		}
	})
}

// Of those that wait, addresses with few connections come first.
func TestAddressesWithFewConnectionsComeFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.MaxHandshakes = 2
		inside := silent(s, "192.0.2.1", 1)
		advance(evictAfter / 2)
		inside = append(inside, silent(s, "192.0.2.1", 1)...)
		last := s.connectFrom("192.0.2.1")
		synctest.Wait()
		first := s.connectFrom("192.0.2.2")
		first.greet(fixedNoZeroes)
		synctest.Wait()
		wantOpen(t, "inside", inside, 1)
		begin := time.Now()
		last.receive(wire.GreetingLen)
		if took := time.Since(begin); took != evictAfter/2 {
			t.Errorf("the other one came after %v, want %v", took, evictAfter/2)
		}
	})
}

// The queue is bounded too: the address with the most waiting connections loses one.
func TestTooManyWaitingConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.MaxHandshakes = 8
		inside := silent(s, "192.0.2.1", 8)
		var queued []*peer
		connect := func(host string) {
			queued = append(queued, s.connectFrom(host))
			synctest.Wait()
		}
		for i := range 3 {
			connect(fmt.Sprintf("192.0.3.%d", i))
		}
		for range 5 {
			connect("192.0.2.1")
		}
		wantOpen(t, "queued", queued, 8)
		connect("192.0.3.4")
		wantHard(t, queued[7].closed(), "too many connections wait")
		connect("192.0.2.1")
		wantHard(t, queued[9].closed(), "too many connections wait")
		wantOpen(t, "all", slices.Concat(inside, queued), 8+8)
		wantNil(t, s.shutdown()) // ends those that wait at once
		wantOpen(t, "after shutdown", queued, 0)
	})
}

// A hundred TLS handshakes at once over real sockets: none fails.
func TestManyTLSHandshakes(t *testing.T) {
	const connections = 100
	s := &Server{Exporter: new(fakeExporter), TLSConfig: serverTLS(), Limits: Limits{HandshakeTimeout: 10 * time.Minute},
		TLSPolicy: func(context.Context, Peer) (TLSMode, error) { return ForcedTLS, nil }}
	l := listen(t, "tcp")
	serveOn(t, s, l)
	var wg sync.WaitGroup
	for range connections {
		wg.Go(func() {
			c, err := client.Dial(t.Context(), "tcp", l.Addr().String(), &client.Config{TLSConfig: clientTLS()})
			if err != nil {
				t.Error(err)
				return
			}
			conn, err := c.Go(t.Context(), "a")
			if err != nil {
				t.Error(err)
				return
			}
			if err := conn.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// Peers that do not continue their TLS handshake do not delay others.
func TestSilentTLSPeersDoNotDelayOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTLSServer(t, ForcedTLS)
		for range 20 {
			p := s.connect()
			p.greet(fixedNoZeroes)
			p.option(wire.OptStartTLS, nil)
			p.want(wire.OptStartTLS, wire.RepAck)
		}
		begin := time.Now()
		p := s.connect()
		p.greet(fixedNoZeroes)
		p.startTLS(nil)
		p.goTo("a")
		if took := time.Since(begin); took != 0 {
			t.Errorf("served after %v, want at once", took)
		}
	})
}

// A peer does not pay for the server's lack of processors.
func TestWaitingForAProcessorIsNotCharged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTLSServer(t, ForcedTLS)
		s.init()
		for range cap(s.tlsSlots) {
			s.tlsSlots.take()
		}
		p := s.connect()
		p.greet(fixedNoZeroes)
		p.option(wire.OptStartTLS, nil)
		p.want(wire.OptStartTLS, wire.RepAck)
		done := make(chan error, 1)
		c := tls.Client(p.nc, clientTLS())
		go func() { done <- c.HandshakeContext(t.Context()) }()
		advance(2 * defaults.HandshakeTimeout)
		for range cap(s.tlsSlots) {
			s.tlsSlots.giveBack()
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		p.nc = c
		p.goTo("a")
	})
}
