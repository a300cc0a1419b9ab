package nbd

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/nbd/wire"
)

// TestDeviceIsClosedAfterTheLastRead: a device is closed after the last read, with any end of
// the connection. A file that is closed during a pread stays open in the kernel, and the disk
// cannot be unplugged.
func TestDeviceIsClosedAfterTheLastRead(t *testing.T) {
	const n = 3
	tests := []struct {
		name     string
		end      func(s *testServer, p *peer)
		answered bool // the peer is still there for the answers
	}{
		{"DISC", func(_ *testServer, p *peer) { p.disc() }, true},
		{"abrupt close", func(_ *testServer, p *peer) { p.nc.Close() }, false},
		{"shutdown", func(s *testServer, _ *peer) { go s.Shutdown(context.Background()) }, true},
		{"hard shutdown", func(s *testServer, _ *peer) {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
				s.t.Errorf("Shutdown returned %v", err)
			}
		}, false},
		{"write failure", func(_ *testServer, p *peer) {
			p.read(9, 1<<19, 512) // is not held, and its answer never taken
			advance(defaults.WriteTimeout)
		}, false},
		{"not a request", func(_ *testServer, p *peer) { p.send(make([]byte, wire.RequestLen)) }, true},
		{"inside a payload", func(_ *testServer, p *peer) {
			p.send(wire.Request{Command: wire.CmdWrite, Length: 1 << 30}.Append(nil))
			p.nc.Close()
		}, false},
		{"inside a request", func(_ *testServer, p *peer) {
			p.send(readRequest(5, 0, 512)[:11])
			p.nc.Close()
		}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t)
				held := newHold(t)
				d := newDevice(1 << 20)
				d.onRead = func(p []byte, off int64) (int, error) {
					if off < 1<<19 {
						return held.read(p, off)
					}
					return len(p), nil
				}
				s.serve(d)
				p := s.negotiated("a")
				for i := range n {
					p.read(uint64(i), i*512, 512)
				}
				synctest.Wait()
				tt.end(s, p)
				advance(time.Minute)
				if reading, _ := d.meter.now(); reading != n || d.closes() != 0 {
					t.Fatalf("with %d reads under way the device was closed %d times, want %d reads and no close", reading, d.closes(), n)
				}
				if !p.open() {
					t.Error("ServeConn returned with reads under way")
				}
				for i := range n {
					held.one <- struct{}{}
					synctest.Wait()
					if tt.answered {
						if r := p.anyReply(); r.Errno != wire.Success || r.Cookie >= n {
							t.Errorf("got reply %+v", r)
						}
						p.receive(512)
					}
					if i < n-1 && d.closes() != 0 {
						t.Fatalf("closed before read %d had returned", i+2)
					}
				}
				if tt.answered {
					p.closed()
				}
				p.end()
				if d.closes() != 1 {
					t.Errorf("device was closed %d times, want once", d.closes())
				}
			})
		})
	}
}
