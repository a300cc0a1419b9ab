package nbd

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"xapi-nbd/nbd/wire"
)

// endingDevice is a fakeDevice that is a Revocable and an ErrorCloser.
type endingDevice struct {
	*fakeDevice
	life  context.Context
	die   context.CancelCauseFunc
	onEnd func() // called by CloseWithError; may be nil

	mu    sync.Mutex
	calls []string // of CloseWithError and Close, in order
	ends  []error  // arguments of CloseWithError
}

func newEnding(size int64) *endingDevice {
	d := &endingDevice{fakeDevice: newDevice(size)}
	d.life, d.die = context.WithCancelCause(context.Background())
	return d
}

func (d *endingDevice) Lifetime() context.Context { return d.life }

func (d *endingDevice) CloseWithError(err error) error {
	if reading, _ := d.meter.now(); reading != 0 {
		d.note("CloseWithError during a read")
	}
	if d.onEnd != nil {
		d.onEnd()
	}
	d.note("CloseWithError")
	d.mu.Lock()
	d.ends = append(d.ends, err)
	d.mu.Unlock()
	return d.fakeDevice.Close()
}

func (d *endingDevice) Close() error {
	d.note("Close")
	return d.fakeDevice.Close()
}

func (d *endingDevice) note(call string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls = append(d.calls, call)
}

// wantCalls expects these calls of CloseWithError and Close up to now.
func (d *endingDevice) wantCalls(t testing.TB, want ...string) {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	if !slices.Equal(d.calls, want) {
		t.Errorf("calls of the device: %q, want %q", d.calls, want)
	}
}

// wantEnd expects that the transmission ended with an error that has this text,
// "" for a soft disconnect, and that ServeConn, CloseWithError and the log agree on it.
func (p *peer) wantEnd(s *testServer, d *endingDevice, text string) {
	p.t.Helper()
	err := p.end()
	reason := "NBD_CMD_DISC"
	switch {
	case text == "" && err != nil:
		p.t.Errorf("ServeConn returned %v, want a soft disconnect", err)
	case text != "" && (err == nil || !strings.Contains(err.Error(), text)):
		p.t.Errorf("ServeConn returned %v, want %q", err, text)
	case err != nil:
		reason = err.Error()
	}
	d.wantCalls(p.t, "CloseWithError")
	if len(d.ends) != 1 || !errors.Is(d.ends[0], err) {
		p.t.Errorf("CloseWithError got %v, ServeConn returned %v", d.ends, err)
	}
	if !slices.ContainsFunc(strings.Split(s.log.String(), "\n"), func(line string) bool {
		return strings.Contains(line, "transmission ended") && strings.Contains(line, reason)
	}) {
		p.t.Errorf("the log does not say that the transmission ended with %q:\n%s", reason, s.log)
	}
}

func TestEndOfTransmission(t *testing.T) {
	disc := wire.Request{Command: wire.CmdDisc}.Append(nil)
	tests := []struct {
		name string
		end  func(s *testServer, p *peer)
		want string // "" for soft
	}{
		{"DISC", func(_ *testServer, p *peer) { p.reads(0, 512); p.disc() }, ""},
		{"DISC as the first request", func(_ *testServer, p *peer) { p.disc() }, ""},
		{"DISC at once behind a read", func(_ *testServer, p *peer) {
			p.send(append(readRequest(1, 0, 512), disc...))
			p.answer(1, 0, 512)
		}, ""},
		{"lost between requests", func(_ *testServer, p *peer) { p.reads(0, 512); p.nc.Close() }, "without NBD_CMD_DISC"},
		{"lost before the first request", func(_ *testServer, p *peer) { p.nc.Close() }, "without NBD_CMD_DISC"},
		{"lost inside a request", func(_ *testServer, p *peer) {
			p.send(readRequest(1, 0, 512)[:9])
			p.nc.Close()
		}, "without NBD_CMD_DISC"},
		{"not a request", func(_ *testServer, p *peer) { p.send(make([]byte, wire.RequestLen)) }, "not a request"},
		{"a reply that nobody takes", func(_ *testServer, p *peer) { p.read(1, 0, 512) }, "does not read its replies"},
		{"idle", func(_ *testServer, p *peer) { p.reads(0, 512) }, "idle"},
		{"not one request", func(*testServer, *peer) {}, "not a single request"},
		{"shutdown", func(s *testServer, p *peer) { p.reads(0, 512); s.shutdown() }, ErrServerClosed.Error()},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t)
				d := newEnding(4096)
				s.serve(d)
				p := s.negotiated("a")
				tt.end(s, p)
				p.wantEnd(s, d, tt.want)
			})
		})
	}
}

// A read in flight delays CloseWithError, but does not change its argument. A client
// that sends DISC need not wait for replies.
func TestEndWithAReadInFlight(t *testing.T) {
	tests := []struct {
		name  string
		end   func(s *testServer, p *peer)
		taken bool // the client takes the reply
		want  string
	}{
		{"DISC", func(_ *testServer, p *peer) { p.disc() }, true, ""},
		{"DISC and close", func(_ *testServer, p *peer) { p.disc(); p.nc.Close() }, false, ""},
		{"DISC without reading", func(_ *testServer, p *peer) { p.disc() }, false, ""},
		{"close", func(_ *testServer, p *peer) { p.nc.Close() }, false, "cannot send a reply"},
		{"shutdown", func(s *testServer, _ *peer) { s.shutdown() }, true, ErrServerClosed.Error()},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t)
				held := newHold(t)
				d := newEnding(4096)
				d.onRead = held.read
				s.serve(d)
				p := s.negotiated("a")
				p.read(1, 0, 512)
				synctest.Wait()
				tt.end(s, p)
				synctest.Wait()
				d.wantCalls(t) // not during the read
				held.release()
				if tt.taken {
					if errno := p.answer(1, 0, 512); errno != wire.Success {
						t.Error(errno)
					}
				}
				p.wantEnd(s, d, tt.want)
			})
		})
	}
}

// The client does not have to wait until CloseWithError returns.
func TestSocketIsClosedBeforeTheDevice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		held := newHold(t)
		d := newEnding(4096)
		d.onEnd = func() { <-held.all }
		s.serve(d)
		p := s.negotiated("a")
		p.disc()
		if n, err := p.nc.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Fatalf("got %d bytes and error %v, want the end of the connection", n, err)
		}
		synctest.Wait()
		d.wantCalls(t) // CloseWithError has not returned
		held.release()
		p.wantEnd(s, d, "")
	})
}

// A device that was opened but not used in a transmission phase is closed with Close.
func TestCloseWithoutTransmission(t *testing.T) {
	tests := []struct {
		name string
		end  func(s *testServer, p *peer)
	}{
		{"INFO and ABORT", func(_ *testServer, p *peer) {
			p.info(wire.OptInfo, "a")
			p.refused(wire.OptAbort, nil, wire.RepAck)
		}},
		{"INFO and lost", func(_ *testServer, p *peer) {
			p.info(wire.OptInfo, "a")
			p.nc.Close()
		}},
		{"INFO and shutdown", func(s *testServer, p *peer) {
			p.info(wire.OptInfo, "a")
			s.shutdown()
		}},
		{"lost inside the answer to GO", func(_ *testServer, p *peer) {
			p.option(wire.OptGo, infoRequest("a"))
			p.receive(1)
			p.nc.Close()
		}},
		{"lost before the answer to EXPORT_NAME", func(_ *testServer, p *peer) {
			p.option(wire.OptExportName, []byte("a"))
			p.nc.Close()
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
				tt.end(s, p)
				p.end()
				d.wantCalls(t, "Close")
			})
		})
	}
}
