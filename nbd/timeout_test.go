package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/nbd/internal/neterr"
	"xapi-nbd/nbd/wire"
)

// TestHandshakeTimeoutIsTheSumOfWaits: single bytes with pauses do not extend the timeout.
func TestHandshakeTimeoutIsTheSumOfWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.HandshakeTimeout = 10 * time.Second
		begin := time.Now()
		p := s.connect()
		p.greet(fixedNoZeroes)
		for i := 0; ; i++ {
			advance(3 * time.Second)
			if !p.open() {
				break
			}
			if i == 3 {
				t.Fatal("still open after 12 s")
			}
			p.refused(wire.OptList, nil, wire.RepErrPolicy)
		}
		wantHard(t, p.end(), "handshake timeout")
		if got := time.Since(begin); got != 12*time.Second {
			t.Errorf("ended in the wait that ended after %v, want 12s", got)
		}
	})
}

func TestHandshakeTimeout(t *testing.T) {
	greeted := func(p *peer) { p.greet(fixedNoZeroes) }
	tests := []struct {
		name string
		do   func(p *peer)
	}{
		{"before the client flags", func(p *peer) { p.receive(wire.GreetingLen) }},
		{"before an option", greeted},
		{"inside an option's header", func(p *peer) {
			greeted(p)
			for _, b := range wire.AppendOption(nil, wire.OptList, nil)[:9] {
				p.send([]byte{b})
				advance(time.Second)
			}
		}},
		{"inside an option's data", func(p *peer) {
			greeted(p)
			b := wire.AppendOption(nil, wire.OptGo, infoRequest("abcdef"))
			p.send(b[:len(b)-1])
		}},
		{"inside data to be skipped", func(p *peer) {
			greeted(p)
			b := wire.AppendOption(nil, wire.OptGo, make([]byte, 20<<10))
			p.send(b[:len(b)-1])
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t)
				begin := time.Now()
				p := s.connect()
				tt.do(p)
				wantHard(t, p.closed(), "handshake timeout")
				if got := time.Since(begin); got != defaults.HandshakeTimeout {
					t.Errorf("ended after %v, want %v", got, defaults.HandshakeTimeout)
				}
			})
		})
	}
}

// xapi may take hours to plug a disk; that is not the peer's fault.
func TestHandshakeTimeoutDoesNotCountTheServersWork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.TLSPolicy = func(context.Context, Peer) (TLSMode, error) {
			<-time.After(time.Hour)
			return NoTLS, nil
		}
		s.exports.open = func(context.Context, Peer, string) (Device, error) {
			<-time.After(2 * time.Hour)
			return newDevice(512), nil
		}
		p := s.connect()
		p.greet(fixedNoZeroes)
		advance(defaults.HandshakeTimeout / 2)
		p.info(wire.OptInfo, "a")
		p.info(wire.OptInfo, "b")
		advance(defaults.HandshakeTimeout/2 - time.Second)
		p.goTo("c")
		p.reads(0, 512)
	})
}

func TestHandshakeTimeoutIncludesTLS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTLSServer(t, ForcedTLS)
		begin := time.Now()
		p := s.connect()
		p.greet(fixedNoZeroes)
		advance(4 * time.Second)
		p.option(wire.OptStartTLS, nil)
		p.want(wire.OptStartTLS, wire.RepAck)
		for _, b := range []byte{22, 3, 1, 2, 0, 1} { // the first bytes of a ClientHello
			p.send([]byte{b})
			advance(time.Second - time.Millisecond)
		}
		err := p.end()
		wantHard(t, err, "TLS handshake failed")
		if !neterr.IsTimeout(err) {
			t.Errorf("%v is no timeout", err)
		}
		if got := time.Since(begin); got != defaults.HandshakeTimeout {
			t.Errorf("ended after %v, want %v", got, defaults.HandshakeTimeout)
		}
	})
}

// After the TLS handshake the rest of the handshake timeout remains.
func TestHandshakeTimeoutContinuesWithTLS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTLSServer(t, ForcedTLS)
		p := s.connect()
		p.greet(fixedNoZeroes)
		advance(6 * time.Second)
		p.startTLS(nil)
		begin := time.Now()
		wantHard(t, p.closed(), "handshake timeout")
		if got := time.Since(begin); got != 4*time.Second {
			t.Errorf("ended after %v more, want 4s", got)
		}
	})
}

func TestFirstRequestTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		p, active := s.negotiated("a"), s.negotiated("b")
		begin := time.Now()
		active.reads(0, 512)
		wantHard(t, p.closed(), "not a single request")
		if got := time.Since(begin) - farewellTime; got != defaults.FirstRequestTimeout {
			t.Errorf("ended after %v, want %v", got, defaults.FirstRequestTimeout)
		}
		advance(defaults.IdleTimeout - time.Since(begin) - time.Second)
		active.reads(0, 512) // a single request was enough
	})
}

func TestIdleTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		p := s.negotiated("a")
		for range 3 {
			p.reads(0, 512)
			advance(defaults.IdleTimeout - time.Second)
		}
		p.reads(0, 512)
		begin := time.Now()
		wantHard(t, p.closed(), "idle")
		if got := time.Since(begin) - farewellTime; got != defaults.IdleTimeout {
			t.Errorf("ended after %v, want %v", got, defaults.IdleTimeout)
		}
	})
}

// TestNotIdleWhileReading: a client that waits for its data is not idle.
func TestNotIdleWhileReading(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		held := newHold(t)
		d := newDevice(4096)
		d.onRead = held.read
		s.serve(d)
		p := s.negotiated("a")
		p.read(1, 0, 512)
		advance(5*defaults.IdleTimeout + time.Minute)
		held.release()
		if errno := p.answer(1, 0, 512); errno != wire.Success {
			t.Error(errno)
		}
		p.reads(512, 512) // is still served
		wantHard(t, p.closed(), "idle")
	})
}

func TestWriteTimeout(t *testing.T) {
	tests := []struct {
		name    string
		length  int
		allowed time.Duration
	}{
		{"small reply", 512, defaults.WriteTimeout},
		// A slow peer gets time for a large reply: a second for 256 KiB.
		{"large reply", 32 << 20, defaults.WriteTimeout + 128*time.Second},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t)
				s.serve(newDevice(64 << 20))
				p := s.negotiated("a")
				begin := time.Now()
				p.read(1, 0, tt.length) // without reading the reply
				wantHard(t, p.end(), "does not read its replies")
				if got := time.Since(begin); got != tt.allowed {
					t.Errorf("ended after %v, want %v", got, tt.allowed)
				}
			})
		})
	}
}

// TestWriteTimeoutIsForTheWholeReply: a reply that is read slowly has the same timeout as one
// that is not read.
func TestWriteTimeoutIsForTheWholeReply(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		p := s.negotiated("a")
		begin := time.Now()
		p.read(1, 0, 1024)
		for {
			if _, err := p.nc.Read(make([]byte, 1)); err != nil {
				break
			}
			advance(time.Second)
		}
		wantHard(t, p.end(), "does not read its replies")
		if got := time.Since(begin); got > defaults.WriteTimeout+time.Second {
			t.Errorf("ended after %v, want %v", got, defaults.WriteTimeout)
		}
	})
}

// After a timeout of a write under TLS nothing of the stream can be trusted;
// closing must not wait for the peer either.
func TestWriteTimeoutWithTLS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTLSServer(t, ForcedTLS)
		p := s.connect()
		p.greet(fixedNoZeroes)
		p.startTLS(nil)
		p.goTo("a")
		begin := time.Now()
		p.read(1, 0, 512)
		wantHard(t, p.end(), "does not read its replies")
		if got := time.Since(begin); got != defaults.WriteTimeout {
			t.Errorf("ended after %v, want %v", got, defaults.WriteTimeout)
		}
	})
}

// The close_notify of TLS goes to a peer that may not be there any more.
func TestCloseWithTLSDoesNotWaitForThePeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTLSServer(t, ForcedTLS)
		p := s.connect()
		p.greet(fixedNoZeroes)
		raw := p.nc
		p.startTLS(nil)
		p.goTo("a")
		begin := time.Now()
		p.disc() // and never reads
		if err := p.end(); err != nil {
			t.Error(err)
		}
		if got := time.Since(begin); got > 10*time.Second {
			t.Errorf("ended after %v", got)
		}
		if _, err := io.Copy(io.Discard, raw); err != nil {
			t.Error(err)
		}
	})
}

func TestPayloadOfRefusedWriteHasATimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		p := s.negotiated("a")
		begin := time.Now()
		p.send(wire.Request{Command: wire.CmdWrite, Length: 1 << 20}.Append(nil))
		p.send(make([]byte, 1<<19))
		err := p.closed()
		wantHard(t, err, "payload")
		if got, want := time.Since(begin), defaults.WriteTimeout+4*time.Second; got != want { // 4 s for 1 MiB
			t.Errorf("ended after %v, want %v", got, want)
		}
	})
}

// TestPolicyContextEndsWithThePeer: the end of the peer ends the context of the policy.
func TestPolicyContextEndsWithThePeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		var cause error
		s.TLSConfig = new(tls.Config)
		s.TLSPolicy = func(ctx context.Context, _ Peer) (TLSMode, error) {
			<-ctx.Done()
			cause = context.Cause(ctx)
			return NoTLS, cause
		}
		p := s.connect()
		p.greet(fixedNoZeroes)
		p.option(wire.OptList, nil)
		advance(time.Hour)
		p.nc.Close()
		p.end()
		if !errors.Is(cause, errPeerGone) {
			t.Errorf("policy's context ended with %v, want %v", cause, errPeerGone)
		}
	})
}
