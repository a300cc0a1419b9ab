package nbd

import (
	"context"
	"errors"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/nbd/wire"
)

const fixedNoZeroes = wire.FlagCFixedNewstyle | wire.FlagCNoZeroes

func TestConnectionLimitIsNamed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.MaxConns = 2
		first := s.negotiated("a")
		s.negotiated("b")

		p := s.connect()
		p.greet(fixedNoZeroes)
		text := p.refused(wire.OptGo, infoRequest("c"), wire.RepErrPolicy)
		for _, want := range []string{"max_connections", "2"} {
			if !strings.Contains(text, want) {
				t.Errorf("refusal says %q, want the limit's name and value: %q", text, want)
			}
		}
		old := s.connect() // EXPORT_NAME has no way to refuse but closing
		old.greet(fixedNoZeroes)
		old.option(wire.OptExportName, []byte("d"))
		wantHard(t, old.closed(), "max_connections")
		if got := s.exports.opened(); !slices.Equal(got, []string{"a", "b"}) {
			t.Errorf("opened %q, want nothing for refused connections", got)
		}

		first.disc()
		if err := first.closed(); err != nil {
			t.Error(err)
		}
		p.goTo("c") // the same connection may try again
	})
}

func TestSlotIsGivenBack(t *testing.T) {
	fails := func(s *testServer, opt wire.Option) {
		p := s.connect()
		p.greet(fixedNoZeroes)
		p.option(opt, []byte("bad"))
		p.closed()
	}
	tests := []struct {
		name string
		use  func(s *testServer)
	}{
		{"EXPORT_NAME refused", func(s *testServer) { fails(s, wire.OptExportName) }},
		{"GO refused", func(s *testServer) {
			p := s.connect()
			p.greet(fixedNoZeroes)
			p.refused(wire.OptGo, infoRequest("bad"), wire.RepErrUnknown)
		}},
		{"disconnected", func(s *testServer) {
			p := s.negotiated("good")
			p.disc()
			p.closed()
		}},
		{"hung up", func(s *testServer) {
			p := s.negotiated("good")
			p.nc.Close()
			p.end()
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t)
				s.MaxConns = 1
				s.exports.open = func(_ context.Context, _ Peer, name string) (Device, error) {
					if name == "bad" {
						return nil, errors.New("broken")
					}
					return newDevice(512), nil
				}
				tt.use(s)
				synctest.Wait()
				s.negotiated("good")
			})
		})
	}
}

func TestInfoThenGo(t *testing.T) {
	start := func(t *testing.T) (*testServer, *peer) {
		s := newTestServer(t)
		p := s.connect()
		p.greet(fixedNoZeroes)
		return s, p
	}
	wantOpened := func(t *testing.T, s *testServer, want ...string) {
		t.Helper()
		if got := s.exports.opened(); !slices.Equal(got, want) {
			t.Errorf("opened %q, want %q", got, want)
		}
	}
	run := func(name string, f func(t *testing.T)) {
		t.Run(name, func(t *testing.T) { synctest.Test(t, f) })
	}
	run("of the same name", func(t *testing.T) {
		s, p := start(t)
		told := p.info(wire.OptInfo, "a", wire.InfoBlockSize)
		if again := p.goTo("a", wire.InfoBlockSize); again != told {
			t.Errorf("GO says %+v, INFO said %+v", again, told)
		}
		p.reads(0, 512)
		wantOpened(t, s, "a")
	})
	run("of another name", func(t *testing.T) {
		s, p := start(t)
		sizes := map[string]int64{"a": 1024, "b": 2048}
		s.exports.open = func(_ context.Context, _ Peer, name string) (Device, error) {
			return newDevice(sizes[name]), nil
		}
		p.info(wire.OptInfo, "a")
		if got := p.goTo("b").Size; got != 2048 {
			t.Errorf("size %d, want that of the export asked for", got)
		}
		p.reads(1024, 1024)
		wantOpened(t, s, "a", "b")
		if n := s.exports.device(0).closes(); n != 1 {
			t.Errorf("the export that INFO opened was closed %d times, want once", n)
		}
	})
	run("of an unknown name", func(t *testing.T) {
		s, p := start(t)
		s.exports.open = func(_ context.Context, _ Peer, name string) (Device, error) {
			if name != "a" {
				return nil, Refuse(ErrUnknownExport, "no", nil)
			}
			return newDevice(512), nil
		}
		p.info(wire.OptInfo, "a")
		p.refused(wire.OptGo, infoRequest("b"), wire.RepErrUnknown)
		if n := s.exports.device(0).closes(); n != 1 {
			t.Errorf("the export that INFO opened was closed %d times, want once", n)
		}
		p.goTo("a")
		wantOpened(t, s, "a", "b", "a")
	})
	for _, end := range []struct {
		name string
		do   func(p *peer)
	}{
		{"disconnect", func(p *peer) { p.nc.Close() }},
		{"ABORT", func(p *peer) { p.refused(wire.OptAbort, nil, wire.RepAck) }},
		{"timeout", func(*peer) { advance(defaults.HandshakeTimeout) }},
	} {
		run("then "+end.name, func(t *testing.T) {
			s, p := start(t)
			p.info(wire.OptInfo, "a")
			end.do(p)
			p.end()
			if n := s.exports.device(0).closes(); n != 1 {
				t.Errorf("device was closed %d times, want once", n)
			}
		})
	}
}

func TestPeerHangsUpWhileOpening(t *testing.T) {
	for _, opt := range []wire.Option{wire.OptInfo, wire.OptGo, wire.OptExportName} {
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
				data := infoRequest("a")
				if opt == wire.OptExportName {
					data = []byte("a")
				}
				p.option(opt, data)
				advance(time.Hour) // as long as the exporter likes
				if !p.open() {
					t.Fatalf("ended while the export was being opened: %v", p.err)
				}
				p.nc.Close()
				p.end()
				if !errors.Is(cause, errPeerGone) {
					t.Errorf("Open's context ended with %v, want %v", cause, errPeerGone)
				}
			})
		})
	}
}

// A device that comes although its peer has gone must not stay open.
func TestDeviceOpenedForALostPeerIsClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.exports.open = func(ctx context.Context, _ Peer, _ string) (Device, error) {
			<-ctx.Done()
			return newDevice(512), nil
		}
		p := s.connect()
		p.greet(fixedNoZeroes)
		p.option(wire.OptGo, infoRequest("a"))
		synctest.Wait()
		p.nc.Close()
		p.end() // the exporter's check finds a device that is not closed
	})
}

// A peer need not wait with its next bytes until the export is open.
func TestBytesSentWhileOpeningAreNotLost(t *testing.T) {
	tests := []struct {
		name string
		opt  wire.Option
		next []byte
		want func(p *peer)
	}{
		{"option behind INFO", wire.OptInfo, wire.AppendOption(nil, wire.OptAbort, nil),
			func(p *peer) { p.want(wire.OptAbort, wire.RepAck) }},
		{"request behind GO", wire.OptGo, readRequest(7, 512, 512),
			func(p *peer) {
				if errno := p.answer(7, 512, 512); errno != wire.Success {
					p.t.Error(errno)
				}
			}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t)
				held := newHold(t)
				s.exports.open = func(context.Context, Peer, string) (Device, error) {
					<-held.all
					return newDevice(4096), nil
				}
				p := s.connect()
				p.greet(fixedNoZeroes)
				p.option(tt.opt, infoRequest("a"))
				var sent sync.WaitGroup
				sent.Go(func() { p.nc.Write(tt.next) })
				synctest.Wait()
				held.release()
				p.want(tt.opt, wire.RepInfo)
				p.want(tt.opt, wire.RepAck)
				tt.want(p)
				sent.Wait()
			})
		})
	}
}

// pipeListener returns the connections and errors that a test puts into accepts.
type pipeListener struct {
	accepts chan any // net.Conn or error
	closed  chan struct{}
	once    sync.Once
}

func newPipeListener() *pipeListener {
	return &pipeListener{accepts: make(chan any), closed: make(chan struct{})}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case <-l.closed:
		return nil, net.ErrClosed
	default:
	}
	select {
	case v := <-l.accepts:
		if err, ok := v.(error); ok {
			return nil, err
		}
		return v.(net.Conn), nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "test", Net: "unix"} }

// dial hands a connection to Serve.
func (l *pipeListener) dial(t testing.TB) *peer {
	near, far := net.Pipe()
	t.Cleanup(func() { near.Close() })
	l.accepts <- far
	return &peer{t: t, nc: near}
}

func TestServeEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		l := newPipeListener()
		ctx, cancel := context.WithCancelCause(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.Serve(ctx, l) }()
		p := l.dial(t)
		p.greet(fixedNoZeroes)
		p.goTo("a")
		why := errors.New("enough")
		cancel(why)
		if err := <-done; !errors.Is(err, why) {
			t.Errorf("Serve ended with %v, want %v", err, why)
		}
		p.reads(0, 512) // connections go on
		select {
		case <-l.closed:
		default:
			t.Error("listener is still open")
		}
	})
}

func TestServeSurvivesAcceptErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		l := newPipeListener()
		done := make(chan error, 1)
		go func() { done <- s.Serve(t.Context(), l) }()
		begin := time.Now()
		var waits []time.Duration
		for range 12 {
			l.accepts <- errors.New("too many open files")
			last := time.Now()
			synctest.Wait()
			l.accepts <- errors.New("too many open files")
			waits = append(waits, time.Since(last))
		}
		if waits[0] == 0 || waits[11] != time.Second || !slices.IsSorted(waits) {
			t.Errorf("waits after errors are %v, want them to grow up to a second", waits)
		}
		if total := time.Since(begin); total > 30*time.Second {
			t.Errorf("24 errors cost %v", total)
		}
		l.dial(t).greet(fixedNoZeroes)
		select {
		case err := <-done:
			t.Errorf("Serve ended: %v", err)
		default:
		}
		l.Close()
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Errorf("Serve ended with %v, want %v", err, net.ErrClosed)
		}
	})
}
