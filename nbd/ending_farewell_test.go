package nbd

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/nbd/wire"
)

// serverEnds are the ends of a transmission that the server decides, with the reasons.
var serverEnds = map[string]struct {
	end    func(s *testServer, d *endingDevice)
	reason string
}{
	"stop":       {func(s *testServer, _ *endingDevice) { s.shutdown() }, ErrServerClosed.Error()},
	"disconnect": {func(s *testServer, _ *endingDevice) { s.Disconnect(s.one().ID) }, "disconnected by the administrator"},
	"revoked":    {func(_ *testServer, d *endingDevice) { d.die(errUnplugged) }, "the device has ended: " + errUnplugged.Error()},
	"idle":       {func(*testServer, *endingDevice) { advance(defaults.IdleTimeout) }, "idle: no request"},
}

// forServerEnds runs a test for each end, in the clear and with TLS, after one request of a
// client whose replies are of the given kind.
func forServerEnds(t *testing.T, replies wire.Option, test func(t *testing.T, s *testServer, d *endingDevice, p *peer, end func())) {
	for name, tt := range serverEnds {
		for _, secure := range []bool{false, true} {
			t.Run(name+map[bool]string{false: "/clear", true: "/TLS"}[secure], func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := newTLSServer(t, map[bool]TLSMode{false: NoTLS, true: ForcedTLS}[secure])
					d := newEnding(1 << 20)
					s.serve(d)
					p := s.connect()
					p.greet(fixedNoZeroes)
					if secure {
						p.startTLS(nil)
					}
					if replies != 0 {
						p.refused(replies, nil, wire.RepAck)
					}
					p.goTo("a")
					if replies == 0 {
						p.reads(0, 512)
					} else {
						c := chunked{p, replies == wire.OptExtendedHeaders}
						c.content(wire.Request{Command: wire.CmdRead, Length: 512})
					}
					test(t, s, d, p, func() {
						tt.end(s, d)
						synctest.Wait()
					})
					p.wantEnd(s, d, tt.reason)
				})
			})
		}
	}
}

// shutdownReply is the simple reply with NBD_ESHUTDOWN, byte by byte.
func shutdownReply(cookie byte) []byte {
	return []byte{0x67, 0x44, 0x66, 0x98, 0, 0, 0, 108, 0, 0, 0, 0, 0, 0, 0, cookie}
}

// A client with simple replies gets an error for each request, whatever it is, until it
// disconnects by itself. Meanwhile it holds neither the device nor a place.
func TestEndOfSimpleClients(t *testing.T) {
	forServerEnds(t, 0, func(t *testing.T, s *testServer, d *endingDevice, p *peer, end func()) {
		end()
		d.wantCalls(t, "CloseWithError")
		if n := s.Serving(); n != 0 {
			t.Errorf("%d connections count against the limit, want 0", n)
		}
		begin := time.Now()
		requests := [][]byte{
			readRequest(1, 0, 512),
			append(wire.Request{Command: wire.CmdWrite, Cookie: 2, Length: 600}.Append(nil), make([]byte, 600)...),
			wire.Request{Command: wire.CmdFlush, Cookie: 3}.Append(nil),
			wire.Request{Command: 99, Cookie: 4}.Append(nil),
		}
		for i, request := range requests {
			p.send(request)
			want := shutdownReply(byte(i + 1))
			if got := p.receive(len(want)); !bytes.Equal(got, want) {
				t.Errorf("request %d: got % x, want % x", i+1, got, want)
			}
		}
		advance(farewellTime - time.Millisecond)
		p.send(append(readRequest(5, 0, 512), readRequest(6, 0, 512)...))
		for _, cookie := range []byte{5, 6} {
			if got, want := p.receive(16), shutdownReply(cookie); !bytes.Equal(got, want) {
				t.Errorf("request %d: got % x, want % x", cookie, got, want)
			}
		}
		p.disc()
		p.wantCut()
		if took := time.Since(begin); took != farewellTime-time.Millisecond {
			t.Errorf("closed after %v, want at once after NBD_CMD_DISC", took)
		}
	})
}

// A client that does not disconnect is closed after farewellTime.
func TestEndOfSilentSimpleClients(t *testing.T) {
	forServerEnds(t, 0, func(t *testing.T, _ *testServer, _ *endingDevice, p *peer, end func()) {
		end()
		begin := time.Now()
		p.wantCut()
		if took := time.Since(begin); took != farewellTime {
			t.Errorf("closed after %v, want %v", took, farewellTime)
		}
	})
}

// So is a client that sends requests and reads no replies.
func TestEndOfSimpleClientsThatDoNotRead(t *testing.T) {
	forServerEnds(t, 0, func(t *testing.T, _ *testServer, _ *endingDevice, p *peer, end func()) {
		end()
		begin := time.Now()
		p.send(readRequest(1, 0, 512))
		go func() { _, _ = p.nc.Write(readRequest(2, 0, 512)) }() // fails: nobody reads it
		<-p.ended
		if took := time.Since(begin); took != farewellTime {
			t.Errorf("closed after %v, want %v", took, farewellTime)
		}
	})
}

// Clients with structured replies get the end of the stream and nothing before it, at once.
func TestEndOfStructuredClients(t *testing.T) {
	for _, replies := range chunkModes {
		t.Run(replies.String(), func(t *testing.T) {
			forServerEnds(t, replies, func(t *testing.T, _ *testServer, _ *endingDevice, p *peer, end func()) {
				end()
				begin := time.Now()
				p.wantCut()
				if took := time.Since(begin); took != 0 {
					t.Errorf("closed after %v, want at once", took)
				}
			})
		})
	}
}

// The replies to requests that have begun come first, for either kind of client. A request
// that has not begun is refused only for clients with simple replies.
func TestEndAfterTheRepliesThatAreOwed(t *testing.T) {
	for name, tt := range serverEnds {
		if name == "idle" {
			continue // there is no request
		}
		for _, structured := range []bool{false, true} {
			t.Run(name+map[bool]string{false: "/simple", true: "/structured"}[structured], func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := newTestServer(t)
					s.MaxInflight = 1
					held := newHold(t)
					d := newEnding(1 << 20)
					d.onRead = held.read
					s.serve(d)
					p := s.connect()
					p.greet(fixedNoZeroes)
					if structured {
						p.refused(wire.OptStructuredReply, nil, wire.RepAck)
					}
					p.goTo("a")
					p.read(1, 512, 512)
					p.read(2, 0, 512)
					synctest.Wait()
					tt.end(s, d)
					synctest.Wait()
					if !structured {
						if got, want := p.receive(16), shutdownReply(2); !bytes.Equal(got, want) {
							t.Errorf("got % x, want % x", got, want)
						}
					}
					held.release()
					if structured {
						want := []byte{0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 2, 8, 0, 0, 0, 0, 0, 0, 2, 0}
						if got := p.receive(len(want)); !bytes.Equal(got, want) {
							t.Errorf("got % x, want % x", got, want)
						}
						if !bytes.Equal(p.receive(512), patternOf(512, 512)) {
							t.Error("wrong data")
						}
					} else {
						p.answer(1, 512, 512)
						p.disc()
					}
					p.wantCut()
					p.wantEnd(s, d, tt.reason)
				})
			})
		}
	}
}

// A WRITE that has not begun is refused with its payload, so that the request after it is
// understood.
func TestEndBeforeAWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.MaxInflight = 1
		held := newHold(t)
		d := newEnding(4096)
		d.onRead = held.read
		s.serve(endingWriter{d})
		p := s.negotiated("a")
		p.read(1, 0, 512)
		p.send(wire.Request{Command: wire.CmdWrite, Cookie: 2, Length: 600}.Append(nil))
		synctest.Wait()
		d.die(errUnplugged)
		p.send(make([]byte, 600))
		if got, want := p.receive(16), shutdownReply(2); !bytes.Equal(got, want) {
			t.Errorf("got % x, want % x", got, want)
		}
		held.release()
		p.answer(1, 0, 512)
		p.read(3, 0, 512)
		if got, want := p.receive(16), shutdownReply(3); !bytes.Equal(got, want) {
			t.Errorf("got % x, want % x", got, want)
		}
		p.disc()
		p.wantCut()
	})
}

// Where the next request begins is not known after a breach of the protocol, and a simple
// reply that is not complete cannot be followed by an error.
func TestEndWithoutFarewell(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		p := s.negotiated("a")
		begin := time.Now()
		p.send(make([]byte, wire.RequestLen))
		p.wantCut()
		wantHard(t, p.end(), "not a request")
		if took := time.Since(begin); took != 0 {
			t.Errorf("closed after %v, want at once", took)
		}
	})
}

// The end of Shutdown's context ends a farewell too.
func TestShutdownCutsAFarewell(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		p := s.negotiated("a")
		ctx, cancel := context.WithTimeout(context.Background(), farewellTime/2)
		defer cancel()
		begin := time.Now()
		done := make(chan error)
		go func() { done <- s.Shutdown(ctx) }()
		p.wantCut()
		if took := time.Since(begin); took != farewellTime/2 {
			t.Errorf("closed after %v, want %v", took, farewellTime/2)
		}
		if err := <-done; err != nil {
			t.Errorf("Shutdown returned %v, but no request was in flight", err)
		}
		if err := p.end(); !errors.Is(err, ErrServerClosed) {
			t.Errorf("ServeConn returned %v, want %v", err, ErrServerClosed)
		}
	})
}

// A Shutdown that begins during a farewell does not shorten it.
func TestShutdownDuringAFarewell(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		d := newEnding(4096)
		closing := newHold(t)
		d.onEnd = func() { _, _ = closing.read(nil, 0) } // the device is still being closed
		s.serve(d)
		p := s.negotiated("a")
		d.die(errUnplugged)
		advance(farewellTime / 2)
		done := s.shutdown()
		p.read(1, 0, 512)
		if got, want := p.receive(16), shutdownReply(1); !bytes.Equal(got, want) {
			t.Errorf("got % x, want % x", got, want)
		}
		p.disc()
		p.wantCut()
		closing.release()
		wantNil(t, done)
	})
}
