package nbd

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/nbd/wire"
)

// The handshake timeout applies to a peer that does not read replies as to one that sends
// nothing, and such a connection is closed to make room too.
func TestHandshakeTimeoutOfAPeerThatDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		p := s.connect()
		p.greet(fixedNoZeroes)
		begin := time.Now()
		p.option(wire.OptList, nil) // and never reads the answer
		wantHard(t, p.end(), "handshake timeout")
		if got := time.Since(begin); got != defaults.HandshakeTimeout {
			t.Errorf("ended after %v, want %v", got, defaults.HandshakeTimeout)
		}
	})
}

// A request that waits for another one at shutdown is answered with ESHUTDOWN.
func TestShutdownAnswersWaitingRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.MaxInflight = 1
		held := newHold(t)
		d := newDevice(4096)
		d.onRead = held.read
		s.serve(d)
		p := s.negotiated("a")
		p.read(1, 0, 512)
		p.read(2, 512, 512)
		synctest.Wait()
		done := s.shutdown()
		if r := p.anyReply(); r.Cookie != 2 || r.Errno != wire.ESHUTDOWN {
			t.Errorf("got %+v, want NBD_ESHUTDOWN for cookie 2", r)
		}
		held.release()
		if errno := p.answer(1, 0, 512); errno != wire.Success {
			t.Error(errno)
		}
		wantNil(t, done)
	})
}

// Idle is who has had no reply for that long, not who has asked for nothing.
func TestIdleCountsFromTheLastReply(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		held := newHold(t)
		d := newDevice(4096)
		d.onRead = held.read
		s.serve(d)
		p := s.negotiated("a")
		p.read(1, 0, 512)
		advance(defaults.IdleTimeout - time.Second)
		held.release()
		p.answer(1, 0, 512)
		begin := time.Now()
		wantHard(t, p.closed(), "idle")
		if got := time.Since(begin) - farewellTime; got != defaults.IdleTimeout {
			t.Errorf("ended %v after the reply, want %v", got, defaults.IdleTimeout)
		}
	})
}

// After a GO that is refused by shutdown the handshake continues: ABORT works.
func TestAbortAfterGoRefusedByShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.exports.open = func(ctx context.Context, _ Peer, _ string) (Device, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		p := s.connect()
		p.greet(fixedNoZeroes)
		p.option(wire.OptGo, infoRequest("a"))
		synctest.Wait()
		done := s.shutdown()
		p.want(wire.OptGo, wire.RepErrShutdown)
		p.option(wire.OptAbort, nil)
		p.want(wire.OptAbort, wire.RepAck)
		wantNil(t, done)
	})
}

// Nothing to wait for is a success, however late.
func TestShutdownOfNothingWithEndedContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range 100 {
		if err := new(Server).Shutdown(ctx); err != nil {
			t.Fatal(err)
		}
	}
}

// All bytes of a handshake have a limit, not only those of one option.
func TestMaxHandshakeBytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.MaxHandshakeBytes = 4 + 2*(wire.OptionHeaderLen+100)
		p := s.connect()
		p.greet(fixedNoZeroes)
		for range 2 {
			p.refused(wire.Option(99), make([]byte, 100), wire.RepErrUnsup)
		}
		go func() { _, _ = p.nc.Write(wire.AppendOption(nil, 99, nil)) }()
		wantHard(t, p.end(), "too many bytes")
	})
}

// A WRITE whose payload is on its way at shutdown is served, for it is owed an
// answer.
func TestShutdownWaitsForAPayload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		d := newWritable(4096)
		s.serve(capableDevice{d})
		p := s.negotiated("a")
		p.send(wire.Request{Command: wire.CmdWrite, Cookie: 7, Length: 1024}.Append(nil))
		p.send(make([]byte, 512))
		done := s.shutdown()
		p.send(make([]byte, 512))
		if r := p.anyReply(); r.Cookie != 7 || r.Errno != wire.Success {
			t.Errorf("got %+v, want a success for cookie 7", r)
		}
		if err := p.closed(); !errors.Is(err, ErrServerClosed) {
			t.Errorf("ServeConn returned %v", err)
		}
		wantNil(t, done)
	})
}
