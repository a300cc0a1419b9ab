package nbd

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/nbd/wire"
)

// sharedServer serves devices that count their reads and writes together. The one
// named "stalled" does not answer until it is released.
func sharedServer(t *testing.T, secure bool) (s *testServer, stalled *hold, all *meter) {
	s = newTestServer(t)
	if secure {
		s = newTLSServer(t, ForcedTLS)
	}
	stalled, all = newHold(t), new(meter)
	s.exports.open = func(_ context.Context, _ Peer, name string) (Device, error) {
		d := &sinkDevice{newDevice(64 * mib)}
		d.meter = all
		if name == "stalled" {
			d.onRead = stalled.read
		}
		return d, nil
	}
	return s, stalled, all
}

// sinkDevice drops the data that is written to it.
type sinkDevice struct{ *fakeDevice }

func (d *sinkDevice) WriteAt(p []byte, off int64) (int, error) {
	return d.ReadAt(make([]byte, len(p)), off)
}

// transmits negotiates, under TLS if the server wants it.
func (s *testServer) transmits(name string) *peer {
	s.t.Helper()
	p := s.connect()
	p.greet(fixedNoZeroes)
	if s.TLSPolicy != nil {
		p.startTLS(nil)
	}
	p.goTo(name)
	return p
}

// usualRead is the length of the reads of Xen Orchestra, usualDepth their number in flight.
const (
	usualRead  = 2 * mib
	usualDepth = 10
)

// TestStalledConnectionsDoNotDelayOthers: connections with little or no progress, for any
// reason, do not delay another one: its requests never wait. Memory stays within its bound.
func TestStalledConnectionsDoNotDelayOthers(t *testing.T) {
	tests := []struct {
		name  string
		conns int
		begin func(s *testServer, over <-chan struct{})
	}{
		{"peers that take nothing", 64, func(s *testServer, _ <-chan struct{}) {
			s.transmits("disk").readMany(usualDepth, usualRead)
		}},
		{"slow lines", 32, func(s *testServer, over <-chan struct{}) {
			p := s.transmits("disk")
			p.readMany(usualDepth, usualRead)
			go func() {
				b := make([]byte, 128<<10)
				for {
					select {
					case <-time.After(time.Second):
					case <-over:
						return
					}
					for rest := b; len(rest) > 0; {
						n, err := p.nc.Read(rest)
						if err != nil {
							return
						}
						rest = rest[n:]
					}
				}
			}()
		}},
		{"stalled disk", 32, func(s *testServer, _ <-chan struct{}) {
			s.transmits("stalled").readMany(usualDepth, usualRead)
		}},
		{"payloads that do not come", 64, func(s *testServer, _ <-chan struct{}) {
			s.transmits("disk").send(ranged(wire.CmdWrite, 0, 0, usualRead).Append(nil))
		}},
		{"writes to a stalled disk", 32, func(s *testServer, _ <-chan struct{}) {
			p := s.transmits("stalled")
			go func() { // ends with the connection
				b := ranged(wire.CmdWrite, 0, 0, usualRead).Append(nil)
				b = append(b, make([]byte, usualRead)...)
				for {
					if _, err := p.nc.Write(b); err != nil {
						return
					}
				}
			}()
		}},
	}
	for _, tt := range tests {
		for secure, how := range map[bool]string{false: "clear", true: "TLS"} {
			t.Run(tt.name+"/"+how, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s, stalled, all := sharedServer(t, secure)
					over := make(chan struct{})
					defer close(over)
					for range tt.conns {
						tt.begin(s, over)
					}
					advance(time.Second)
					begin := time.Now()
					for range 3 {
						p := s.transmits("disk")
						pullMuch(t, p)
						p.writes(0, 0, make([]byte, usualRead))
						p.disc()
						p.closed()
					}
					if waited := time.Since(begin); waited > 0 {
						t.Errorf("the honest clients waited %v", waited)
					}
					bound := defaults.MaxInflightBytes + int64(tt.conns+1)*reserveSize
					if got := inFlight(s); got > bound || all.maxBytes > bound {
						t.Errorf("%d bytes are in flight, %d were in a device at one time; want %d at most", got, all.maxBytes, bound)
					}
					if got := s.Serving(); got != tt.conns {
						t.Errorf("%d of %d connections are left", got, tt.conns)
					}
					stalled.release()
				})
			})
		}
	}
}

// pullMuch reads 40 MiB as Xen Orchestra does.
func pullMuch(t *testing.T, p *peer) {
	t.Helper()
	for range 2 {
		p.readMany(usualDepth, usualRead)
		if err := p.answers(usualDepth, usualRead); err != nil {
			t.Fatal(err)
		}
	}
}

// Who sits on memory that others need is cut, with the reason; who takes a byte now
// and then is not.
func TestStuckConnectionIsClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, stalled, _ := sharedServer(t, false)
		defer stalled.release()
		s.MaxInflightBytes = 16 * mib
		moving := func(name string) (*peer, *testMeter) {
			p := s.transmits("disk")
			synctest.Wait() // until it transmits
			m := new(testMeter)
			setMeter(s, m)
			p.readMany(2, usualRead)
			advance(time.Second)
			return p, m
		}
		stuck, _ := moving("stuck")
		slow, meter := moving("slow")
		honest := s.transmits("disk")
		for range int(stuckAfter/time.Second) + 2 {
			meter.moved++
			honest.reads(0, 3*mib) // there would be room if others held less
			time.Sleep(time.Second)
		}
		synctest.Wait()
		wantHard(t, stuck.end(), stuckReason)
		if !slow.open() {
			t.Errorf("one that makes progress was cut: %v", slow.err)
		}
		if log := s.log.String(); !strings.Contains(log, stuckReason) {
			t.Errorf("the log does not tell: %s", log)
		}
	})
}

// setMeter gives the connections that have none of the test a meter.
func setMeter(s *testServer, m *testMeter) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		if c.view.transmission.Load() == nil {
			continue
		}
		i := c.view.transmission.Load().inflight
		i.budget.mu.Lock()
		if _, is := i.meter.(*testMeter); !is {
			i.meter = m
		}
		i.budget.mu.Unlock()
	}
}
