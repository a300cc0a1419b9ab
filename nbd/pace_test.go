package nbd

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/nbd/wire"
)

// pacedDevice lets a byte through each nanosecond, or waits for the end.
type pacedDevice struct {
	*fakeDevice
	forEver bool
}

func (d pacedDevice) Paces() bool { return true }

func (d pacedDevice) Pace(ctx context.Context, n int64) {
	wait := time.Duration(n)
	if d.forEver {
		wait = 1 << 62
	}
	select {
	case <-time.After(wait):
	case <-ctx.Done():
	}
}

// TestPace: a read is sent when Pace has returned, with or without TLS and with every kind of
// reply.
func TestPace(t *testing.T) {
	for _, structured := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer(t)
			s.serve(pacedDevice{newDevice(1 << 20), false})
			p := s.connect()
			p.greet(fixedNoZeroes)
			reply := wire.SimpleReplyLen
			if structured {
				p.option(wire.OptStructuredReply, nil)
				p.want(wire.OptStructuredReply, wire.RepAck)
				reply = wire.ChunkLen + wire.ChunkOffsetLen
			}
			p.goTo("a")
			begin := time.Now()
			p.read(1, 0, 65536)
			p.receive(reply + 65536)
			if got := time.Since(begin); got < 65536 || got > 65536+10*time.Millisecond {
				t.Errorf("structured replies %v: the answer came after %v", structured, got)
			}
			p.disc()
			p.closed()
		})
	}
}

// pacedWriter is a pacedDevice that can be written.
type pacedWriter struct{ capableDevice }

func (d pacedWriter) Paces() bool { return true }

func (d pacedWriter) Pace(ctx context.Context, n int64) { pacedDevice{}.Pace(ctx, n) }

// A write, which carries its own data, is stored when it may be, with FUA too.
func TestPaceOfWrites(t *testing.T) {
	for _, flags := range []wire.CommandFlags{0, wire.CmdFlagFUA} {
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer(t)
			d := newWritable(1 << 20)
			stored := make(chan time.Time, 2) // the flush is the second call
			d.before = func(string) error { stored <- time.Now(); return nil }
			s.serve(pacedWriter{capableDevice{d}})
			p := s.negotiated("a")
			begin := time.Now()
			p.request(wire.Request{Command: wire.CmdWrite, Flags: flags, Cookie: 1, Length: 65536}, make([]byte, 65536))
			if got := (<-stored).Sub(begin); got < 65536 || got > 65536+10*time.Millisecond {
				t.Errorf("flags %v: stored after %v", flags, got)
			}
			p.receive(wire.SimpleReplyLen)
			p.disc()
			p.closed()
		})
	}
}

// Zeroes are written at the pace of the device too, in pieces, but not trims, and not with
// FAST_ZERO.
func TestPaceOfZeroes(t *testing.T) {
	const size, length = 64 << 20, maxZero + 65536
	for _, tt := range []struct {
		name    string
		command wire.Command
		flags   wire.CommandFlags
		want    []time.Duration // when each call of the device begins
	}{
		{"zeroes", wire.CmdWriteZeroes, 0, []time.Duration{maxZero, length}},
		{"zeroes that stay allocated", wire.CmdWriteZeroes, wire.CmdFlagNoHole, []time.Duration{maxZero, length}},
		{"fast zeroes", wire.CmdWriteZeroes, wire.CmdFlagFastZero, []time.Duration{0}},
		{"trim", wire.CmdTrim, 0, []time.Duration{0}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t)
				d := newWritable(size)
				called := make(chan time.Time, 8)
				d.before = func(string) error { called <- time.Now(); return nil }
				s.serve(pacedWriter{capableDevice{d}})
				p := s.negotiated("a")
				begin := time.Now()
				p.request(wire.Request{Command: tt.command, Flags: tt.flags, Cookie: 1, Length: length}, nil)
				p.receive(wire.SimpleReplyLen)
				close(called)
				var got []time.Duration
				for at := range called {
					got = append(got, at.Sub(begin))
				}
				if len(got) != len(tt.want) {
					t.Fatalf("got calls after %v, want %v", got, tt.want)
				}
				for i := range got {
					if got[i] < tt.want[i] || got[i] > tt.want[i]+10*time.Millisecond {
						t.Errorf("got calls after %v, want %v", got, tt.want)
					}
				}
				p.disc()
				p.closed()
			})
		})
	}
}

// Pace does not delay the end of a connection or of the server.
func TestPaceEndsWithTheConnection(t *testing.T) {
	tests := []struct {
		name string
		end  func(s *testServer, p *peer)
	}{
		{"hangs up", func(_ *testServer, p *peer) { p.nc.Close() }},
		{"stop", func(s *testServer, p *peer) {
			done := s.shutdown()
			p.receive(2 * (wire.SimpleReplyLen + 512)) // the replies are sent nevertheless
			p.disc()
			wantNil(s.t, done)
		}},
		{"disconnect", func(s *testServer, _ *peer) { s.Disconnect(s.one().ID) }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t)
				s.serve(pacedDevice{newDevice(1 << 20), true})
				p := s.negotiated("a")
				p.read(1, 0, 512)
				p.read(2, 0, 512)
				synctest.Wait()
				begin := time.Now()
				tt.end(s, p)
				p.end()
				if got := time.Since(begin); got > time.Second {
					t.Errorf("ended after %v", got)
				}
			})
		})
	}
}
