package nbd

import (
	"context"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/nbd/wire"
)

var errUnplugged = errors.New("somebody unplugged the disk")

// wantUnpluggedSlowly is wantUnplugged of a client with simple replies that does not
// disconnect in the time that it has for that.
func (p *peer) wantUnpluggedSlowly(s *testServer, d *endingDevice, at time.Time) {
	p.t.Helper()
	p.wantUnplugged(s, d, at.Add(farewellTime))
}

// wantUnplugged expects that the connection ended because its device did, at
// the time given.
func (p *peer) wantUnplugged(s *testServer, d *endingDevice, at time.Time) {
	p.t.Helper()
	err := p.end()
	wantHard(p.t, err, errUnplugged.Error())
	if !errors.Is(err, errUnplugged) {
		p.t.Errorf("%v does not match the cause", err)
	}
	if got := time.Since(at); got != 0 {
		p.t.Errorf("ended %v too late", got)
	}
	p.wantEnd(s, d, errUnplugged.Error())
}

// wantCut expects that the server closes the connection without a further byte.
func (p *peer) wantCut() {
	p.t.Helper()
	if n, err := p.nc.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		p.t.Errorf("got %d bytes and error %v, want the end of the connection", n, err)
	}
}

// TestLifetimeEndsWhileIdle: the end of the device ends an idle connection at once.
func TestLifetimeEndsWhileIdle(t *testing.T) {
	tests := []struct {
		name   string
		before func(p *peer)
	}{
		{"before the first request", func(*peer) {}},
		{"after a request", func(p *peer) { p.reads(0, 512); advance(time.Minute) }},
		{"inside a request", func(p *peer) { p.send(readRequest(1, 0, 512)[:9]) }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t)
				d := newEnding(4096)
				s.serve(d)
				p := s.negotiated("a")
				tt.before(p)
				synctest.Wait()
				at := time.Now()
				d.die(errUnplugged)
				p.wantCut()
				p.wantUnpluggedSlowly(s, d, at)
			})
		})
	}
}

// A device that was revoked before the end of the handshake is not read.
func TestLifetimeEndsBeforeTransmission(t *testing.T) {
	tests := []struct {
		name  string
		enter func(p *peer, d *endingDevice)
	}{
		{"GO", func(p *peer, d *endingDevice) {
			d.die(errUnplugged)
			p.goTo("a")
		}},
		{"EXPORT_NAME", func(p *peer, d *endingDevice) {
			d.die(errUnplugged)
			p.option(wire.OptExportName, []byte("a"))
			p.receive(8 + 2)
		}},
		{"between INFO and GO", func(p *peer, d *endingDevice) {
			p.info(wire.OptInfo, "a")
			d.die(errUnplugged)
			p.goTo("a")
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t)
				d := newEnding(4096)
				s.serve(d)
				p := s.connect()
				p.greet(fixedNoZeroes)
				at := time.Now()
				tt.enter(p, d)
				p.wantCut()
				p.wantUnpluggedSlowly(s, d, at)
			})
		})
	}
}

// The revoked device fails a read; the client gets the error before the end.
func TestLifetimeEndsDuringAReadThatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		d := newEnding(4096)
		d.onRead = func([]byte, int64) (int, error) {
			<-d.life.Done()
			return 0, context.Cause(d.life)
		}
		s.serve(d)
		p := s.negotiated("a")
		p.read(1, 0, 512)
		p.read(2, 512, 512)
		synctest.Wait()
		at := time.Now()
		d.die(errUnplugged)
		cookies := uint64(0)
		for range 2 {
			r := p.anyReply()
			if r.Errno != wire.EIO {
				t.Errorf("got %v for cookie %d, want %v", r.Errno, r.Cookie, wire.EIO)
			}
			cookies += r.Cookie
		}
		if cookies != 1+2 {
			t.Error("the replies are not those to the two requests")
		}
		p.wantCut()
		p.wantUnpluggedSlowly(s, d, at)
	})
}

// TestLifetimeEndsDuringAReadThatHangs: while a read hangs the device stays open, but the
// connection ends.
func TestLifetimeEndsDuringAReadThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		held := newHold(t)
		d := newEnding(4096)
		d.onRead = held.read
		s.serve(d)
		p := s.negotiated("a")
		p.read(1, 0, 512)
		synctest.Wait()
		at := time.Now()
		d.die(errUnplugged)
		p.wantCut()
		if got := time.Since(at); got != revokeGrace {
			t.Errorf("cut after %v, want %v", got, revokeGrace)
		}
		advance(time.Hour)
		d.wantCalls(t) // not during the read
		at = time.Now()
		held.release()
		p.wantUnplugged(s, d, at)
	})
}

// A request that hangs for a short time is answered.
func TestLifetimeEndsDuringASlowRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		held := newHold(t)
		d := newEnding(4096)
		d.onRead = held.read
		s.serve(d)
		p := s.negotiated("a")
		p.read(1, 0, 512)
		synctest.Wait()
		d.die(errUnplugged)
		advance(revokeGrace - time.Millisecond)
		at := time.Now()
		held.release()
		if errno := p.answer(1, 0, 512); errno != wire.Success {
			t.Error(errno)
		}
		p.wantCut()
		p.wantUnpluggedSlowly(s, d, at)
	})
}

// A request that waits for another one is not begun, even when that one ends.
func TestLifetimeEndsBeforeARequestBegins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.MaxInflight = 1
		d := newEnding(4096)
		asked := make(chan struct{})
		d.onRead = func([]byte, int64) (int, error) {
			<-asked
			d.die(errUnplugged) // which also makes room
			return 0, errUnplugged
		}
		s.serve(d)
		p := s.negotiated("a")
		p.send(append(readRequest(1, 0, 512), readRequest(2, 0, 512)...))
		synctest.Wait()
		at := time.Now()
		close(asked)
		for range 2 {
			want := map[uint64]wire.Errno{1: wire.EIO, 2: wire.ESHUTDOWN}
			if r := p.anyReply(); r.Errno != want[r.Cookie] {
				t.Errorf("got %v for cookie %d, want %v", r.Errno, r.Cookie, want[r.Cookie])
			}
		}
		p.wantCut()
		if d.meter.reads != 1 {
			t.Errorf("%d reads, want 1", d.meter.reads)
		}
		p.wantUnpluggedSlowly(s, d, at)
	})
}

// endingWriter is an endingDevice that takes writes.
type endingWriter struct{ *endingDevice }

func (endingWriter) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

// A request whose payload is on its way has begun.
func TestLifetimeEndsInsideAPayload(t *testing.T) {
	start := func(t *testing.T) (*testServer, *endingDevice, *peer) {
		s := newTestServer(t)
		d := newEnding(4096)
		s.serve(endingWriter{d})
		p := s.negotiated("a")
		p.send(wire.Request{Command: wire.CmdWrite, Cookie: 7, Length: 1024}.Append(nil))
		p.send(make([]byte, 512))
		synctest.Wait()
		d.die(errUnplugged)
		return s, d, p
	}
	t.Run("that arrives", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s, d, p := start(t)
			advance(revokeGrace / 2)
			at := time.Now()
			p.send(make([]byte, 512))
			if r := p.anyReply(); r.Cookie != 7 || r.Errno != wire.Success {
				t.Errorf("got %+v, want a success for cookie 7", r)
			}
			p.wantCut()
			p.wantUnpluggedSlowly(s, d, at)
		})
	})
	t.Run("that does not", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s, d, p := start(t)
			at := time.Now().Add(revokeGrace)
			p.wantCut()
			p.wantUnplugged(s, d, at)
		})
	})
}

// A client that does not read its reply is given no more time than revokeGrace.
func TestLifetimeEndsDuringAReplyThatIsNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		d := newEnding(4096)
		s.serve(d)
		p := s.negotiated("a")
		p.read(1, 0, 512)
		synctest.Wait()
		at := time.Now().Add(revokeGrace)
		d.die(errUnplugged)
		p.wantUnplugged(s, d, at)
	})
}

// Shutdown waits for reads in flight as long as it may, but not for those of a
// device that has ended.
func TestLifetimeEndsDuringShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		held := newHold(t)
		d := newEnding(4096)
		d.onRead = held.read
		s.serve(d)
		p := s.negotiated("a")
		p.read(1, 0, 512)
		synctest.Wait()
		done := s.shutdown()
		advance(time.Minute)
		at := time.Now()
		d.die(errUnplugged)
		p.wantCut()
		if got := time.Since(at); got != revokeGrace {
			t.Errorf("cut after %v, want %v", got, revokeGrace)
		}
		at = time.Now()
		held.release()
		p.wantUnplugged(s, d, at)
		wantNil(t, done)
	})
}

// TestLifetimeEndsAfterDisc: after NBD_CMD_DISC the end counts as the client's, also if the
// device is revoked then.
func TestLifetimeEndsAfterDisc(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		held := newHold(t)
		d := newEnding(4096)
		d.onRead = held.read
		s.serve(d)
		p := s.negotiated("a")
		p.read(1, 0, 512)
		p.disc()
		synctest.Wait()
		at := time.Now()
		d.die(errUnplugged)
		p.wantCut()
		if got := time.Since(at); got != revokeGrace {
			t.Errorf("cut after %v, want %v", got, revokeGrace)
		}
		held.release()
		p.wantEnd(s, d, "")
	})
}

// TLS is shut down before TCP, but a peer that does not read does not keep the
// device from being closed.
func TestLifetimeEndsWithTLS(t *testing.T) {
	start := func(t *testing.T) (*testServer, *endingDevice, *peer) {
		s := newTLSServer(t, ForcedTLS)
		d := newEnding(4096)
		s.serve(d)
		p := s.connect()
		p.greet(fixedNoZeroes)
		p.startTLS(nil)
		p.goTo("a")
		p.reads(0, 512)
		synctest.Wait()
		d.die(errUnplugged)
		return s, d, p
	}
	t.Run("a client that reads", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s, d, p := start(t)
			at := time.Now()
			p.wantCut() // io.EOF: with close_notify
			p.wantUnpluggedSlowly(s, d, at)
		})
	})
	t.Run("a client that does not", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s, d, p := start(t)
			at := time.Now().Add(alertTime)
			p.wantUnpluggedSlowly(s, d, at)
		})
	})
}
