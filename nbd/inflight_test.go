package nbd

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/nbd/wire"
)

func TestRepliesInAnyOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 8
		s := newTestServer(t)
		d := newDevice(n * 512)
		var gates [n]*hold
		for i := range gates {
			gates[i] = newHold(t)
		}
		d.onRead = func(p []byte, off int64) (int, error) { return gates[off/512].read(p, off) }
		s.serve(d)
		p := s.negotiated("a")
		cookie := func(i int) uint64 { return 0xfedcba9876543210 ^ uint64(i)<<60 ^ uint64(i) }
		for i := range n {
			p.read(cookie(i), i*512, 512)
		}
		synctest.Wait()
		if reading, _ := d.meter.now(); reading != n {
			t.Fatalf("%d reads under way at once, want %d", reading, n)
		}
		order := rand.New(rand.NewPCG(1, 2)).Perm(n)
		for _, i := range append(order[1:], order[0]) {
			gates[i].release()
			if errno := p.answer(cookie(i), i*512, 512); errno != wire.Success {
				t.Errorf("read %d: %v", i, errno)
			}
		}
	})
}

// The first request of a connection must not delay the requests after it.
func TestRepliesDoNotWaitForASlowRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		held := newHold(t)
		d := newDevice(1 << 20)
		d.onRead = func(p []byte, off int64) (int, error) {
			if off == 0 {
				return held.read(p, off)
			}
			pattern(p, off)
			return len(p), nil
		}
		s.serve(d)
		p := s.negotiated("a")
		p.read(1, 0, 4096)
		for i := 1; i < 100; i++ {
			p.reads(i*4096, 4096)
		}
		held.release()
		p.answer(1, 0, 4096)
	})
}

// recordingConn records the bytes of each call of Write.
type recordingConn struct {
	net.Conn
	mu     sync.Mutex
	writes [][]byte
}

func (c *recordingConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	c.writes = append(c.writes, bytes.Clone(p))
	c.mu.Unlock()
	return c.Conn.Write(p)
}

// Clients read a whole answer with one call, and a header alone in a packet
// costs a round trip with some of them.
func TestOneWritePerReply(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		var rec *recordingConn
		p := s.connectBy(func(nc net.Conn) net.Conn {
			rec = &recordingConn{Conn: nc}
			return rec
		})
		p.greet(fixedNoZeroes)
		p.goTo("a", wire.InfoName, wire.InfoBlockSize)
		lengths := []int{0, 1, 512, 4096, 4097, 1 << 20}
		for i, n := range lengths {
			p.read(uint64(i), 0, n)
			p.answer(uint64(i), 0, n)
		}
		p.read(99, 1<<20, 1)
		p.answer(99, 0, 0)
		p.disc()
		p.closed()
		if got, want := len(rec.writes), 2+len(lengths)+1; got != want {
			t.Fatalf("%d writes, want %d: greeting, answer to GO, and one for each reply", got, want)
		}
		for i, n := range append(lengths, 0) {
			if got := len(rec.writes[2+i]); got != wire.SimpleReplyLen+n {
				t.Errorf("reply %d: a write of %d bytes, want %d", i, got, wire.SimpleReplyLen+n)
			}
		}
	})
}

// XO and others read the 134 bytes of the old answer with one call.
func TestExportNameAnswerIsOneWrite(t *testing.T) {
	for flags, want := range map[wire.ClientFlags]int{0: 134, wire.FlagCFixedNewstyle: 134, fixedNoZeroes: 10} {
		synctest.Test(t, func(t *testing.T) {
			var rec *recordingConn
			p := newTestServer(t).connectBy(func(nc net.Conn) net.Conn {
				rec = &recordingConn{Conn: nc}
				return rec
			})
			p.greet(flags)
			p.option(wire.OptExportName, []byte("a"))
			p.receive(want)
			p.reads(0, 512)
			if got := len(rec.writes[1]); got != want {
				t.Errorf("client flags %v: answer in a write of %d bytes, want %d", flags, got, want)
			}
		})
	}
}

// However a connection ends, its device is closed after the last read: a
// blocking-mode file closed under a pread stays open in the kernel, and the
// disk cannot be unplugged.
func TestDeviceIsClosedAfterTheLastRead(t *testing.T) {
	const n = 3
	tests := []struct {
		name     string
		end      func(s *testServer, p *peer)
		answered bool // the peer is still there for the answers
	}{
		{"DISC", func(_ *testServer, p *peer) { p.disc() }, true},
		{"abrupt close", func(_ *testServer, p *peer) { p.nc.Close() }, false},
		{"shutdown", func(s *testServer, _ *peer) { go s.Shutdown(context.Background()) }, true},
		{"hard shutdown", func(s *testServer, _ *peer) {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
				s.t.Errorf("Shutdown returned %v", err)
			}
		}, false},
		{"write failure", func(_ *testServer, p *peer) {
			p.read(9, 1<<19, 512) // is not held, and its answer never taken
			advance(defaults.WriteTimeout)
		}, false},
		{"not a request", func(_ *testServer, p *peer) { p.send(make([]byte, wire.RequestLen)) }, true},
		{"inside a payload", func(_ *testServer, p *peer) {
			p.send(wire.Request{Command: wire.CmdWrite, Length: 1 << 30}.Append(nil))
			p.nc.Close()
		}, false},
		{"inside a request", func(_ *testServer, p *peer) {
			p.send(readRequest(5, 0, 512)[:11])
			p.nc.Close()
		}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t)
				held := newHold(t)
				d := newDevice(1 << 20)
				d.onRead = func(p []byte, off int64) (int, error) {
					if off < 1<<19 {
						return held.read(p, off)
					}
					return len(p), nil
				}
				s.serve(d)
				p := s.negotiated("a")
				for i := range n {
					p.read(uint64(i), i*512, 512)
				}
				synctest.Wait()
				tt.end(s, p)
				advance(time.Minute)
				if reading, _ := d.meter.now(); reading != n || d.closes() != 0 {
					t.Fatalf("with %d reads under way the device was closed %d times, want %d reads and no close", reading, d.closes(), n)
				}
				if !p.open() {
					t.Error("ServeConn returned with reads under way")
				}
				for i := range n {
					held.one <- struct{}{}
					synctest.Wait()
					if tt.answered {
						if r := p.anyReply(); r.Errno != wire.Success || r.Cookie >= n {
							t.Errorf("got reply %+v", r)
						}
						p.receive(512)
					}
					if i < n-1 && d.closes() != 0 {
						t.Fatalf("closed before read %d had returned", i+2)
					}
				}
				if tt.answered {
					p.closed()
				}
				p.end()
				if d.closes() != 1 {
					t.Errorf("device was closed %d times, want once", d.closes())
				}
			})
		})
	}
}
