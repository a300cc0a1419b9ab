package nbd

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"xapi-nbd/nbd/wire"
)

// latencyOf returns the histogram of reads with these durations.
func latencyOf(took ...time.Duration) ReadLatency {
	l := ReadLatency{Counts: make([]int64, len(ReadLatencyBounds())+1)}
	for _, d := range took {
		i := slices.IndexFunc(ReadLatencyBounds(), func(bound time.Duration) bool { return d <= bound })
		if i < 0 {
			i = len(l.Counts) - 1
		}
		l.Counts[i]++
		l.Sum += d
	}
	return l
}

func (s *testServer) wantLatency(where string, took ...time.Duration) {
	s.t.Helper()
	synctest.Wait()
	if diff := cmp.Diff(latencyOf(took...), s.Totals().ReadLatency); diff != "" {
		s.t.Errorf("%s: want -, got +\n%s", where, diff)
	}
}

// TestReadLatencyBounds: ReadLatencyBounds returns the documented bounds.
func TestReadLatencyBounds(t *testing.T) {
	bounds := ReadLatencyBounds()
	if bounds[0] != 100*time.Microsecond || bounds[len(bounds)-1] != time.Minute || !slices.IsSorted(bounds) {
		t.Errorf("got %v, want them to go from 100µs to 1m", bounds)
	}
	bounds[0] = 0
	if ReadLatencyBounds()[0] == 0 {
		t.Error("a caller can change the bounds")
	}
}

// A read counts in the bucket of the time that the device took, whichever goroutine
// serves it: the reader of requests, that one after it has lost the read token, or
// another. The counts stay when the connection ends.
func TestReadLatency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var device time.Duration
		s := sleepyServer(t, &device)
		p := s.negotiated("a")
		s.wantLatency("before the first read")
		var all []time.Duration
		read := func(took time.Duration) {
			device = took
			p.reads(0, 4096)
			all = append(all, took)
			s.wantLatency("after a read of "+took.String(), all...)
		}
		// Of the bound itself, and of a little more. The first one that takes longer than
		// stallTime makes the device slow, and further ones get their own goroutines.
		for _, bound := range ReadLatencyBounds() {
			read(bound)
			read(bound + 1)
		}
		device = 0
		for range fastRun + 1 { // until the reader of requests serves them again
			read(0)
		}
		p.disc()
		p.closed()
		s.wantLatency("when the connection has ended", all...)
	})
}

// The latency does not include the time that the peer takes for the reply, the pauses of a
// rate limit, and commands other than READ.
func TestReadLatencyIsOfTheDeviceOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		device := 3 * time.Millisecond
		s := sleepyServer(t, &device)
		p := s.negotiated("a")
		p.read(1, 0, 4096)
		advance(time.Second) // the reply waits for the peer meanwhile
		if errno := p.answer(1, 0, 4096); errno != wire.Success {
			t.Errorf("got %v", errno)
		}
		p.does(wire.Request{Command: wire.CmdFlush}, nil)
		s.wantLatency("after a slow peer and another command", device)
		p.disc()
		p.closed()
	})
}

// Each piece of a READ that is served in pieces counts.
func TestReadLatencyOfPieces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const took = 20 * time.Millisecond
		d := newDevice(1 << 20)
		d.onRead = func(p []byte, off int64) (int, error) {
			time.Sleep(took)
			pattern(p, off)
			return len(p), nil
		}
		s := piecesServer(t, d)
		p := s.negotiated("a")
		p.reads(777, piecesLength)
		s.wantLatency("after three pieces", took, took, took)
		p.disc()
		p.closed()
	})
}

// A READ of data around a hole counts once.
func TestReadLatencyOfParts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const took = 7 * time.Millisecond
		s := newTestServer(t)
		fake := newDevice(1 << 20)
		fake.onRead = func(p []byte, off int64) (int, error) {
			time.Sleep(took)
			pattern(p, off)
			return len(p), nil
		}
		s.serve(&sparseDevice{fakeDevice: fake, extents: func(int64, int64) ([]wire.Extent, error) {
			return []wire.Extent{{Length: worthAsking}, {Length: worthAsking, Status: wire.StateZero}, {Length: worthAsking}}, nil
		}})
		p := s.connect().chunked(wire.OptStructuredReply, "a")
		p.content(ranged(wire.CmdRead, 0, 0, 3*worthAsking))
		s.wantLatency("after data, a hole and data", 2*took)
		p.disc()
		p.closed()
	})
}

// Reads that fail count with the time that the device took to fail, and a panic of a
// device too: storage that fails after a long time must not look fast.
func TestReadLatencyOfFailures(t *testing.T) {
	for name, fail := range map[string]func() (int, error){
		"error": func() (int, error) { return 0, errors.New("broken") },
		"panic": func() (int, error) { panic("broken") },
		"short": func() (int, error) { return 1, nil },
	} {
		for _, pieces := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				const took = 40 * time.Second
				d := newDevice(1 << 20)
				d.onRead = func([]byte, int64) (int, error) {
					time.Sleep(took)
					return fail()
				}
				s, length := newTestServer(t), 4096
				s.serve(d)
				if pieces {
					s.MaxInflightBytes, length = 1, piecesLength
				}
				p := s.negotiated("a")
				p.read(1, 0, length)
				if errno := p.answer(1, 0, length); errno != wire.EIO {
					t.Errorf("%s: got %v, want EIO", name, errno)
				}
				s.wantLatency(name, took)
				if stall := s.one().ReadStall; stall != 0 {
					t.Errorf("%s: a stall of %v after the end of the read", name, stall)
				}
				p.disc()
				p.closed()
			})
		}
	}
}

// TestReadStall: a read that hangs is in no bucket until it ends. Meanwhile the connection's
// ReadStall is the time since a read last ended; it is 0 without reads in flight.
func TestReadStall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		h := newHold(t)
		d := newDevice(1 << 20)
		d.onRead = h.read
		s.serve(d)
		p := s.negotiated("a")
		stall := func(when string, want time.Duration) {
			t.Helper()
			synctest.Wait()
			if got := s.one().ReadStall; got != want {
				t.Errorf("%s: a stall of %v, want %v", when, got, want)
			}
		}
		advance(30 * time.Second)
		stall("idle", 0)
		p.read(1, 0, 4096)
		stall("a read has just begun", 0)
		advance(2 * time.Second)
		p.read(2, 0, 4096)
		advance(3 * time.Second)
		stall("one hangs for 5 s", 5*time.Second)
		s.wantLatency("while reads hang")
		h.one <- struct{}{}
		p.anyReply()
		p.receive(4096)
		stall("one of two has ended", 0)
		advance(4 * time.Second)
		stall("the other one hangs", 4*time.Second)
		h.release()
		p.anyReply()
		p.receive(4096)
		stall("both have ended", 0)
		advance(time.Minute)
		stall("idle again", 0)
		if got := s.Totals().ReadLatency; got.Sum != 5*time.Second+7*time.Second && got.Sum != 3*time.Second+9*time.Second {
			t.Errorf("they took %v in all, want 12 s", got.Sum)
		}
		p.disc()
		p.closed()
	})
}

// TestReadLatencyOfSeveralConnections: the sum over open and ended connections never decreases.
func TestReadLatencyOfSeveralConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		times := map[string]time.Duration{"a": 2 * time.Millisecond, "b": 2 * time.Minute}
		s.exports.open = func(_ context.Context, _ Peer, name string) (Device, error) {
			d := newDevice(1 << 20)
			d.onRead = func(p []byte, off int64) (int, error) {
				time.Sleep(times[name])
				pattern(p, off)
				return len(p), nil
			}
			return d, nil
		}
		a, b := s.negotiated("a"), s.negotiated("b")
		a.reads(0, 4096)
		b.reads(0, 4096)
		s.wantLatency("both live", times["a"], times["b"])
		a.disc()
		a.closed()
		s.wantLatency("one has ended", times["a"], times["b"])
		b.disc()
		b.closed()
	})
}
