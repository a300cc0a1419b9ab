package nbd

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
)

// shutdown starts a Shutdown without a limit.
func (s *testServer) shutdown() <-chan error {
	done := make(chan error, 1)
	go func() { done <- s.Shutdown(context.Background()) }()
	synctest.Wait()
	return done
}

func wantNil(t testing.TB, done <-chan error) {
	t.Helper()
	if err := <-done; err != nil {
		t.Errorf("Shutdown returned %v", err)
	}
}

func TestShutdownEndsIdleConnectionsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		silent, used := s.chunked(wire.OptStructuredReply, "a"), s.chunked(wire.OptStructuredReply, "b")
		used.content(wire.Request{Command: wire.CmdRead, Length: 512})
		begin := time.Now()
		done := s.shutdown()
		for _, p := range []*chunked{silent, used} {
			if err := p.closed(); !errors.Is(err, ErrServerClosed) {
				t.Errorf("ServeConn returned %v, want %v", err, ErrServerClosed)
			}
		}
		wantNil(t, done)
		if got := time.Since(begin); got != 0 {
			t.Errorf("took %v", got)
		}
	})
}

// Section "NBD_REP_ERR_SHUTDOWN": options are refused with it, and ABORT works.
func TestShutdownRefusesHandshakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		p := s.connect()
		p.greet(fixedNoZeroes)
		p.info(wire.OptInfo, "a")
		done := s.shutdown()
		for _, opt := range []wire.Option{wire.OptList, wire.OptInfo, wire.OptGo, wire.OptStartTLS, wire.OptStructuredReply} {
			p.refused(opt, infoRequest("a"), wire.RepErrShutdown)
		}
		p.refused(wire.OptAbort, nil, wire.RepAck)
		if err := p.closed(); err != nil {
			t.Errorf("ServeConn returned %v after ABORT", err)
		}
		wantNil(t, done)
	})
}

func TestShutdownDoesNotWaitForSilentHandshakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		fresh, greeted, old := s.connect(), s.connect(), s.connect()
		fresh.receive(wire.GreetingLen)
		greeted.greet(fixedNoZeroes)
		old.greet(fixedNoZeroes)
		begin := time.Now()
		done := s.shutdown()
		old.option(wire.OptExportName, []byte("a")) // has no way to be refused
		wantHard(t, old.closed(), wire.RepErrShutdown.String())
		for _, p := range []*peer{fresh, greeted} {
			if err := p.closed(); !errors.Is(err, ErrServerClosed) {
				t.Errorf("ServeConn returned %v, want %v", err, ErrServerClosed)
			}
		}
		wantNil(t, done)
		if got := time.Since(begin); got != shutdownGrace {
			t.Errorf("took %v, want %v", got, shutdownGrace)
		}
		if got := s.exports.opened(); len(got) != 0 {
			t.Errorf("opened %q while shutting down", got)
		}
	})
}

func TestShutdownCancelsOpen(t *testing.T) {
	for _, opt := range []wire.Option{wire.OptInfo, wire.OptGo} {
		t.Run(opt.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t)
				var cause error
				s.exports.open = func(ctx context.Context, _ Peer, _ string) (Device, error) {
					<-ctx.Done()
					cause = context.Cause(ctx)
					return nil, ctx.Err()
				}
				p := s.connect()
				p.greet(fixedNoZeroes)
				p.option(opt, infoRequest("a"))
				synctest.Wait()
				done := s.shutdown()
				p.want(opt, wire.RepErrShutdown)
				wantNil(t, done)
				if !errors.Is(cause, ErrServerClosed) {
					t.Errorf("Open's context ended with %v, want %v", cause, ErrServerClosed)
				}
			})
		})
	}
}

// Reads that the server has taken are answered before the connection ends.
func TestShutdownAnswersReadsInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		held := newHold(t)
		d := newDevice(1 << 20)
		d.onRead = held.read
		s.serve(d)
		p := s.negotiated("a")
		for i := range 3 {
			p.read(uint64(i), i*512, 512)
		}
		synctest.Wait()
		done := s.shutdown()
		advance(time.Hour)
		if len(done) != 0 || !p.open() {
			t.Fatal("did not wait for reads in flight")
		}
		held.release()
		for range 3 {
			if r := p.anyReply(); r.Errno != wire.Success {
				t.Error(r.Errno)
			}
			p.receive(512)
		}
		if err := p.closed(); !errors.Is(err, ErrServerClosed) {
			t.Errorf("ServeConn returned %v, want %v", err, ErrServerClosed)
		}
		wantNil(t, done)
	})
}

// Shutdown must not wait for a read that hangs, and a request that waits for the budget ends
// too.
func TestShutdownDisconnectsHardWhenItsContextEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.MaxInflight = 1
		held := newHold(t)
		d := newDevice(1 << 20)
		d.onRead = held.read
		s.serve(d)
		p := s.negotiated("a")
		p.readMany(3, 512)
		synctest.Wait()
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		begin := time.Now()
		if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Shutdown returned %v, want %v", err, context.DeadlineExceeded)
		}
		if got := time.Since(begin); got != 5*time.Second {
			t.Errorf("took %v, want 5s", got)
		}
		if n, err := p.nc.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
			t.Errorf("got %d bytes and %v, want the connection cut", n, err)
		}
		if d.closes() != 0 {
			t.Error("device was closed with a read under way")
		}
		held.release()
		err := p.end()
		wantHard(t, err, "not drained in time")
		if !errors.Is(err, ErrServerClosed) {
			t.Errorf("%v does not match %v", err, ErrServerClosed)
		}
		if d.closes() != 1 {
			t.Errorf("device was closed %d times, want once", d.closes())
		}
	})
}

func TestShutdownEndsServe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		served := make(chan error, 2)
		listeners := []*pipeListener{newPipeListener(), newPipeListener()}
		for _, l := range listeners {
			go func() { served <- s.Serve(t.Context(), l) }()
		}
		p := listeners[0].dial(t)
		p.greet(fixedNoZeroes)
		p.goTo("a")
		listeners[1].accepts <- errors.New("too many open files")
		synctest.Wait() // one is in Accept, one waits after an error
		wantNil(t, s.shutdown())
		for range 2 {
			if err := <-served; !errors.Is(err, ErrServerClosed) {
				t.Errorf("Serve returned %v, want %v", err, ErrServerClosed)
			}
		}

		late := newPipeListener()
		if err := s.Serve(t.Context(), late); !errors.Is(err, ErrServerClosed) {
			t.Errorf("Serve after Shutdown returned %v, want %v", err, ErrServerClosed)
		}
		select {
		case <-late.closed:
		default:
			t.Error("the listener of a late Serve is still open")
		}
		c := s.connect()
		if err := c.closed(); !errors.Is(err, ErrServerClosed) {
			t.Errorf("ServeConn after Shutdown returned %v, want %v", err, ErrServerClosed)
		}
	})
}

func TestShutdownTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		held := newHold(t)
		d := newDevice(1 << 20)
		d.onRead = held.read
		s.serve(d)
		p := s.negotiated("a")
		p.read(1, 0, 512)
		synctest.Wait()
		first, second := s.shutdown(), s.shutdown()
		if len(first)+len(second) != 0 {
			t.Fatal("did not wait for a read in flight")
		}
		held.release()
		p.answer(1, 0, 512)
		wantNil(t, first)
		wantNil(t, second)
		wantNil(t, s.shutdown())
	})
	var unused Server // never served anything
	for range 2 {
		if err := unused.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

// Connections that arrive while the server is shutting down must not be served, and must not
// leave a goroutine or a device.
func TestConnectionsDuringShutdown(t *testing.T) {
	s := newTestServer(t)
	opened := make(chan struct{}, 100)
	s.exports.open = func(context.Context, Peer, string) (Device, error) {
		opened <- struct{}{}
		return newDevice(512), nil
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(t.Context(), l) }()
	clients := make(chan error, 20)
	for range cap(clients) {
		go func() {
			c, err := client.Dial(t.Context(), "tcp", l.Addr().String(), nil)
			if err != nil {
				clients <- nil // came too late
				return
			}
			conn, err := c.Go(t.Context(), "a")
			if err != nil {
				c.Abort()
				clients <- nil
				return
			}
			var b [512]byte
			for err == nil {
				_, err = conn.ReadAt(b[:], 0)
			}
			clients <- conn.Close()
		}()
	}
	for range 3 { // some are served now, some are in the handshake, some arrive later
		<-opened
	}
	if err := s.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	if err := <-served; !errors.Is(err, ErrServerClosed) {
		t.Errorf("Serve returned %v, want %v", err, ErrServerClosed)
	}
	for range cap(clients) {
		if err := <-clients; err != nil {
			t.Error(err)
		}
	}
}

// deadlines is a connection that reports its read deadlines.
type deadlines struct {
	net.Conn
	set func()
}

func (d deadlines) SetReadDeadline(time.Time) error { d.set(); return nil }

// stop sets the deadline of the handshake before it closes stopped, because goroutines that
// wait for that set an earlier one, which must remain.
func TestStopSetsItsDeadlineFirst(t *testing.T) {
	c := &conn{stopped: make(chan struct{})}
	n := 0
	c.nc = deadlines{set: func() {
		n++
		if c.isStopped() {
			t.Error("the end is known before the deadline is set")
		}
	}}
	c.stop()
	if n != 1 || !c.isStopped() {
		t.Errorf("%d deadlines, stopped %v", n, c.isStopped())
	}
}
