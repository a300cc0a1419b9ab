package nbd

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/internal/testcert"
	"xapi-nbd/nbd/wire"
)

const serverName = "nbd.test"

var certificate = sync.OnceValue(func() *testcert.Cert { return testcert.SelfSigned(serverName) })

// serverTLS has no session tickets: over net.Pipe a client that does not read
// them would keep the server from reading.
func serverTLS() *tls.Config {
	c := certificate().ServerConfig()
	c.SessionTicketsDisabled = true
	return c
}

func clientTLS() *tls.Config { return certificate().ClientConfig(serverName) }

func newTLSServer(t testing.TB, mode TLSMode) *testServer {
	s := newTestServer(t)
	s.TLSConfig = serverTLS()
	s.TLSPolicy = func(context.Context, Peer) (TLSMode, error) { return mode, nil }
	return s
}

// startTLS puts the peer under TLS; nil means a client that trusts the server.
func (p *peer) startTLS(cfg *tls.Config) {
	p.t.Helper()
	p.option(wire.OptStartTLS, nil)
	p.want(wire.OptStartTLS, wire.RepAck)
	if cfg == nil {
		cfg = clientTLS()
	}
	c := tls.Client(p.nc, cfg)
	if err := c.HandshakeContext(context.Background()); err != nil {
		p.t.Fatal(err)
	}
	p.nc = c
}

func TestForcedTLS(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTLSServer(t, ForcedTLS)
				p := s.connect()
				p.greet(fixedNoZeroes)
				cfg := clientTLS()
				cfg.MaxVersion = version
				p.startTLS(cfg)
				if text := p.refused(wire.OptStartTLS, nil, wire.RepErrInvalid); text == "" {
					t.Error("STARTTLS under TLS is refused without a text")
				}
				p.goTo("a")
				p.reads(0, 4096)
				p.reads(512, 100<<10) // more than one TLS record
				if state := s.exports.peers[0].TLS; state == nil || state.Version != version {
					t.Errorf("the exporter got TLS %+v, want %s", state, tls.VersionName(version))
				}
			})
		})
	}
}

// Section "TLS support", FORCEDTLS: nothing but ABORT and STARTTLS is answered
// before TLS, and nothing is given away or done.
func TestForcedTLSInTheClear(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTLSServer(t, ForcedTLS)
		p := s.connect()
		p.greet(fixedNoZeroes)
		for _, opt := range []wire.Option{
			wire.OptList, wire.OptPeekExport, wire.OptInfo, wire.OptGo, wire.OptStructuredReply,
			wire.OptListMetaContext, wire.OptSetMetaContext, wire.OptExtendedHeaders, 4711,
		} {
			p.refused(opt, nil, wire.RepErrTLSReqd)
			p.refused(opt, infoRequest("a"), wire.RepErrTLSReqd)
			p.refused(opt, make([]byte, 10<<10), wire.RepErrTLSReqd)
		}
		p.refused(wire.OptAbort, nil, wire.RepAck)
		if err := p.closed(); err != nil {
			t.Error(err)
		}
		old := s.connect()
		old.greet(fixedNoZeroes)
		old.option(wire.OptExportName, []byte("a"))
		wantHard(t, old.closed(), wire.RepErrTLSReqd.String())
		if got := s.exports.opened(); len(got) != 0 {
			t.Errorf("opened %q before TLS", got)
		}
	})
}

func TestNoTLSRefusesSTARTTLS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		p := s.connect()
		p.greet(fixedNoZeroes)
		p.refused(wire.OptStartTLS, nil, wire.RepErrPolicy)
		p.refused(wire.OptStartTLS, nil, wire.RepErrPolicy)
		p.goTo("a") // never ERR_TLS_REQD
		p.reads(0, 512)
	})
}

func TestSTARTTLSWithData(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newTLSServer(t, ForcedTLS).connect()
		p.greet(fixedNoZeroes)
		p.refused(wire.OptStartTLS, []byte{0}, wire.RepErrInvalid)
		p.startTLS(nil) // the handshake continued
		p.goTo("a")
	})
}

func TestNotFixedNewstyleClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTLSServer(t, SelectiveTLS)
		s.serve(newDevice(0x1234))
		p := s.connect()
		p.greet(0)
		p.refused(wire.OptStartTLS, nil, wire.RepErrPolicy) // section "Client flags": it acts as NOTLS
		p.option(wire.OptExportName, []byte("a"))
		b := p.receive(wire.ExportNameReplyLen + wire.ExportNameZeroes)
		size, flags := wire.ParseExportNameReply((*[wire.ExportNameReplyLen]byte)(b))
		if size != 0x1234 || flags != wire.FlagHasFlags|wire.FlagReadOnly|wire.FlagCanMultiConn {
			t.Errorf("got size %#x, flags %v", size, flags)
		}
		p.reads(0, 0x1234)
	})
	synctest.Test(t, func(t *testing.T) {
		p := newTLSServer(t, ForcedTLS).connect()
		p.greet(wire.FlagCNoZeroes)
		p.refused(wire.OptStartTLS, nil, wire.RepErrPolicy)
		p.option(wire.OptExportName, []byte("a"))
		wantHard(t, p.closed(), "EXPORT_NAME")
	})
}

// TestSTARTTLSDropsTheOpenedExport: after STARTTLS nothing that was negotiated in the clear is
// valid, section "TLS support".
func TestSTARTTLSDropsTheOpenedExport(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTLSServer(t, SelectiveTLS)
		p := s.connect()
		p.greet(fixedNoZeroes)
		p.info(wire.OptInfo, "a")
		p.startTLS(nil)
		if n := s.exports.device(0).closes(); n != 1 {
			t.Errorf("the export that INFO opened in the clear was closed %d times, want once", n)
		}
		p.goTo("a")
		p.reads(0, 512)
		if got := s.exports.opened(); !slices.Equal(got, []string{"a", "a"}) {
			t.Errorf("opened %q, want it opened anew under TLS", got)
		}
		if s.exports.peers[0].TLS != nil || s.exports.peers[1].TLS == nil {
			t.Error("the exporter got the wrong TLS state")
		}
	})
}

func TestSelectiveTLSInTheClear(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTLSServer(t, SelectiveTLS)
		s.exports.open = func(_ context.Context, peer Peer, name string) (Device, error) {
			if name == "secret" && peer.TLS == nil {
				return nil, Refuse(ErrTLSRequired, "only under TLS", nil)
			}
			return newDevice(512), nil
		}
		p := s.connect()
		p.greet(fixedNoZeroes)
		p.refused(wire.OptInfo, infoRequest("secret"), wire.RepErrTLSReqd)
		p.refused(wire.OptGo, infoRequest("secret"), wire.RepErrTLSReqd)
		p.startTLS(nil)
		p.goTo("secret")

		p = s.connect()
		p.greet(fixedNoZeroes)
		p.goTo("a")
		p.reads(0, 512)
	})
}

// Plaintext in the same packet as STARTTLS may have been injected by an attacker. It must not
// be used with TLS (such as CVE-2021-3716).
func TestPlaintextAfterSTARTTLS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTLSServer(t, ForcedTLS)
		p := s.connect()
		p.greet(fixedNoZeroes)
		injected := wire.AppendOption(nil, wire.OptStartTLS, nil)
		injected = wire.AppendOption(injected, wire.OptGo, infoRequest("injected"))
		var sent sync.WaitGroup
		sent.Go(func() { p.nc.Write(injected) })
		p.want(wire.OptStartTLS, wire.RepAck)
		synctest.Wait()
		// Only if the server has kept the plaintext can this succeed.
		if tls.Client(p.nc, clientTLS()).HandshakeContext(context.Background()) == nil {
			t.Error("TLS began behind plaintext that came after STARTTLS")
		}
		p.nc.Close()
		err, reason := p.end(), "TLS handshake failed"
		if early := "before STARTTLS was answered"; err != nil && strings.Contains(err.Error(), early) {
			reason = early // read ahead while the server watches for the end of the peer
		}
		wantHard(t, err, reason)
		sent.Wait()
		if got := s.exports.opened(); len(got) != 0 {
			t.Errorf("plaintext opened %q", got)
		}
	})
}

// The same, but the plaintext arrives while the policy is asked, when the
// server reads ahead to see whether its peer is still there.
func TestPlaintextAfterSTARTTLSDuringPolicy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTLSServer(t, ForcedTLS)
		asked := newHold(t)
		s.TLSPolicy = func(context.Context, Peer) (TLSMode, error) {
			<-asked.all
			return ForcedTLS, nil
		}
		p := s.connect()
		p.greet(fixedNoZeroes)
		var sent sync.WaitGroup
		sent.Go(func() {
			p.nc.Write(wire.AppendOption(wire.AppendOption(nil, wire.OptStartTLS, nil), wire.OptGo, infoRequest("injected")))
		})
		synctest.Wait()
		asked.release()
		p.want(wire.OptStartTLS, wire.RepAck)
		wantHard(t, p.closed(), "before STARTTLS was answered")
		sent.Wait()
	})
}

func TestFailedTLSHandshakeEndsTheSession(t *testing.T) {
	tests := []struct {
		name string
		cfg  func() *tls.Config
	}{
		{"certificate not trusted", func() *tls.Config {
			c := clientTLS()
			c.RootCAs = x509.NewCertPool()
			return c
		}},
		{"old version", func() *tls.Config {
			c := clientTLS()
			c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
			return c
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTLSServer(t, SelectiveTLS)
				p := s.connect()
				p.greet(fixedNoZeroes)
				p.option(wire.OptStartTLS, nil)
				p.want(wire.OptStartTLS, wire.RepAck)
				if tls.Client(p.nc, tt.cfg()).HandshakeContext(context.Background()) == nil {
					t.Fatal("handshake succeeded")
				}
				wantHard(t, p.end(), "TLS handshake failed")
				if _, err := p.nc.Write([]byte{0}); !errors.Is(err, io.ErrClosedPipe) {
					t.Errorf("connection goes on after a failed handshake: %v", err)
				}
			})
		})
	}
}

// Section "TLS support": on DISC TLS is shut down before TCP. Without its
// close_notify crypto/tls would report io.ErrUnexpectedEOF.
func TestCloseNotify(t *testing.T) {
	tests := []struct {
		name string
		end  func(p *peer)
	}{
		{"after DISC", func(p *peer) { p.disc() }},
		{"after ABORT", func(p *peer) { p.refused(wire.OptAbort, nil, wire.RepAck) }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newTLSServer(t, ForcedTLS).connect()
				p.greet(fixedNoZeroes)
				p.startTLS(nil)
				if strings.Contains(tt.name, "DISC") {
					p.goTo("a")
					p.reads(0, 512)
				}
				tt.end(p)
				if err := p.closed(); err != nil { // wants io.EOF
					t.Error(err)
				}
			})
		})
	}
}

// The peer may be gone or may hang while it shakes hands.
func TestShutdownDuringTLSHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTLSServer(t, ForcedTLS)
		p := s.connect()
		p.greet(fixedNoZeroes)
		p.option(wire.OptStartTLS, nil)
		p.want(wire.OptStartTLS, wire.RepAck)
		begin := time.Now()
		if err := s.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		p.end()
		if got := time.Since(begin); got > shutdownGrace {
			t.Errorf("ended after %v", got)
		}
	})
}

func TestTLSModeString(t *testing.T) {
	for mode, want := range map[TLSMode]string{NoTLS: "NOTLS", SelectiveTLS: "SELECTIVETLS", ForcedTLS: "FORCEDTLS"} {
		if got := fmt.Sprint(mode); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

// Payloads of less than a record of TLS, and of many, arrive as they are.
func TestTLSPayload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTLSServer(t, ForcedTLS)
		d := newWritable(1 << 20)
		s.serve(d)
		p := s.connect()
		p.greet(wire.FlagCFixedNewstyle | wire.FlagCNoZeroes)
		p.startTLS(clientTLS())
		p.goTo("")
		p.writes(0, 0, patternOf(0, 4096))
		data := patternOf(7, 512<<10)
		p.writes(0, 4096, data)
		if got := d.content(); !bytes.Equal(got[:4096], patternOf(0, 4096)) || !bytes.Equal(got[4096:][:len(data)], data) {
			t.Error("the payload has changed")
		}
		p.disc()
	})
}
