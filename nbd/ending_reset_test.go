package nbd

import (
	"context"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"xapi-nbd/nbd/wire"
)

// unreadConn is a client's connection whose server has unread bytes in its socket
// when it ends the connection: in the transmission phase, or before.
type unreadConn struct {
	*peer
	s    *testServer
	d    *endingDevice
	held *hold // of all reads but the first
}

// wantEOF requires the end of the stream, never a reset, however much the peer was about to
// send.
func (u *unreadConn) wantEOF() {
	u.t.Helper()
	u.nc.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := io.Copy(io.Discard, u.nc); err != nil {
		u.t.Errorf("the peer read %v, want the end of the stream", err)
	}
}

// unreadEnds are the ways in which the server ends a connection. Each begins when a request
// has been answered and the peer has sent bytes that the server has not read.
func unreadEnds() map[string]func(u *unreadConn) {
	disc := wire.Request{Command: wire.CmdDisc}.Append(nil)
	return map[string]func(u *unreadConn){
		"DISC and more":       func(u *unreadConn) { u.send(append(disc, make([]byte, 100_000)...)) },
		"not a request":       func(u *unreadConn) { u.send(make([]byte, 100_000)) },
		"by an administrator": func(u *unreadConn) { u.fill(); u.s.Disconnect(u.s.Conns()[0].ID); u.held.release() },
		"logged out":          func(u *unreadConn) { u.fill(); u.d.die(errors.New("logged out")); u.held.release() },
		"a read that hangs":   func(u *unreadConn) { u.fill(); u.d.die(errors.New("logged out")) },
		"shutdown": func(u *unreadConn) {
			u.fill()
			go u.s.Shutdown(context.Background())
			u.held.release() // the reply to this is owed
		},
		"cut at shutdown": func(u *unreadConn) {
			u.fill()
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			_ = u.s.Shutdown(ctx)
		},
		"no request for too long": func(u *unreadConn) {
			u.send(readRequest(3, 0, 512)[:9])
		},
	}
}

// fill sends more requests than the server reads, since none is answered. NBD_CMD_DISC and
// further bytes follow: clients with simple replies are closed at once after that.
func (u *unreadConn) fill() {
	u.t.Helper()
	var b []byte
	for i := range 200 {
		b = append(b, readRequest(uint64(100+i), 0, 512)...)
	}
	u.send(append(wire.Request{Command: wire.CmdDisc}.Append(b), make([]byte, 50_000)...))
}

func TestEndsWithoutReset(t *testing.T) {
	for _, network := range []string{"tcp", "unix"} {
		for _, tls := range []TLSMode{NoTLS, ForcedTLS} {
			for _, replies := range []string{"simple", "structured"} {
				for name, end := range unreadEnds() {
					mode := map[TLSMode]string{NoTLS: "clear", ForcedTLS: "TLS"}[tls]
					t.Run(network+"/"+mode+"/"+replies+"/"+name, func(t *testing.T) {
						t.Parallel()
						s := newTLSServer(t, tls)
						if name == "no request for too long" {
							s.IdleTimeout = 10 * time.Millisecond
						}
						u := s.unread(network, replies == "structured")
						end(u)
						u.wantEOF()
						u.held.release()
					})
				}
			}
		}
	}
}

// unread connects to the server by a socket. One request has been answered.
func (s *testServer) unread(network string, structured bool) *unreadConn {
	s.t.Helper()
	s.MaxInflight = 1
	d := newEnding(1 << 20)
	held := newHold(s.t)
	var first atomic.Bool
	d.onRead = func(p []byte, off int64) (int, error) {
		if first.CompareAndSwap(false, true) {
			pattern(p, off)
			return len(p), nil
		}
		return held.read(p, off)
	}
	s.serve(d)
	l := listen(s.t, network)
	serveOn(s.t, &s.Server, l)
	s.t.Cleanup(held.release) // or a test that fails waits for ever
	nc, err := net.Dial(network, l.Addr().String())
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { nc.Close() })
	u := &unreadConn{peer: &peer{t: s.t, nc: nc}, s: s, d: d, held: held}
	u.greet(fixedNoZeroes)
	if mode, _ := s.TLSPolicy(s.t.Context(), Peer{}); mode == ForcedTLS {
		u.startTLS(nil)
	}
	if structured {
		u.refused(wire.OptStructuredReply, nil, wire.RepAck)
	}
	u.goTo("a")
	if structured {
		(&chunked{peer: u.peer}).content(wire.Request{Command: wire.CmdRead, Length: 512})
	} else {
		u.reads(0, 512)
	}
	return u
}

// Connections that end during the handshake end in the same way.
func TestHandshakeEndsWithoutReset(t *testing.T) {
	junk := make([]byte, 100_000)
	// part is an option whose data does not arrive as a whole.
	part := wire.AppendOption(wire.AppendClientFlags(nil, fixedNoZeroes), wire.OptList, make([]byte, 4096))[:1000]
	tests := map[string]func(s *testServer, p *peer){
		"unknown flags": func(_ *testServer, p *peer) { p.send(append([]byte{0xff, 0xff, 0xff, 0xff}, junk...)) },
		"not an option": func(_ *testServer, p *peer) { p.send(append(wire.AppendClientFlags(nil, 3), junk...)) },
		"a TLS handshake that fails": func(_ *testServer, p *peer) {
			p.send(wire.AppendClientFlags(nil, fixedNoZeroes))
			p.option(wire.OptStartTLS, nil)
			p.want(wire.OptStartTLS, wire.RepAck)
			p.send(append([]byte("GET / HTTP/1.1\r\n\r\n"), junk...))
		},
		"ABORT and more": func(_ *testServer, p *peer) {
			p.send(append(wire.AppendOption(wire.AppendClientFlags(nil, fixedNoZeroes), wire.OptAbort, nil), junk...))
		},
		"EXPORT_NAME refused, and more": func(s *testServer, p *peer) {
			s.exports.open = func(context.Context, Peer, string) (Device, error) { return nil, Refuse(ErrPolicy, "no", nil) }
			p.send(append(wire.AppendOption(wire.AppendClientFlags(nil, fixedNoZeroes), wire.OptExportName, []byte("a")), junk...))
		},
		"stop":                func(s *testServer, p *peer) { p.send(part); go s.Shutdown(context.Background()) },
		"by an administrator": func(s *testServer, p *peer) { p.send(part); s.Disconnect(s.Conns()[0].ID) },
		"too slow":            func(_ *testServer, p *peer) { p.send(part) },
	}
	for name, end := range tests {
		t.Run(name, func(t *testing.T) {
			s := newTLSServer(t, SelectiveTLS)
			if name == "too slow" {
				s.HandshakeTimeout = 100 * time.Millisecond
			}
			l := listen(t, "tcp")
			serveOn(t, &s.Server, l)
			nc, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			p := &peer{t: t, nc: nc}
			p.receive(wire.GreetingLen)
			end(s, p)
			(&unreadConn{peer: p, s: s}).wantEOF()
		})
	}
}

// A peer that neither reads nor closes does not keep a connection for long, and does
// not count against the limits meanwhile.
func TestHangingUpIsBounded(t *testing.T) {
	s := newTestServer(t)
	s.MaxConns = 1
	l := listen(t, "tcp")
	serveOn(t, &s.Server, l)
	for range 3 {
		nc, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		p := &peer{t: t, nc: nc}
		p.greet(fixedNoZeroes)
		p.goTo("a")
		p.disc()
		(&unreadConn{peer: p, s: s}).wantEOF() // and stays
	}
	// The cleanup of the server waits until all are closed.
}
