//go:build linux

package nbd

import (
	"net"
	"runtime"
	"testing"
	"time"
)

// eager returns a busy socket whose last wait was short, and its peer.
func eager(t *testing.T) (*socket, net.Conn) {
	t.Helper()
	if n := runtime.GOMAXPROCS(0); n < 2 { // nobody spins then
		runtime.GOMAXPROCS(2)
		t.Cleanup(func() { runtime.GOMAXPROCS(n) })
	}
	s, peer := socketPair(t, "tcp", true)
	s.spins = true
	return s, peer
}

// arrive has a byte arrive at s.
func arrive(t *testing.T, s *socket, peer net.Conn) {
	t.Helper()
	if _, err := peer.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
	for !s.reading.ready(uintptr(s.fd)) {
		yieldNow()
	}
}

func TestSpinFindsWhatArrives(t *testing.T) {
	s, peer := eager(t)
	arrive(t, s, peer)
	if !s.spin(time.Now()) {
		t.Error("what is there was not found")
	}
	if !s.spins {
		t.Error("spinning was worth it, but is given up")
	}
	if n := spinners.Load(); n != 0 {
		t.Errorf("%d readers count as spinning", n)
	}
}

// Who waits on a busy socket spins if it is to wait eagerly, and else does not.
func TestWhoSpins(t *testing.T) {
	for m, want := range map[manner]bool{eagerly: true, patiently: false, calmly: false} {
		s, peer := eager(t)
		arrive(t, s, peer)
		s.manner.Store(int32(m))
		spun, ready := false, s.reading.ready
		s.reading.ready = func(fd uintptr) bool {
			spun = spun || spinners.Load() == 1
			return ready(fd)
		}
		if err := s.wait(&s.reading); err != nil {
			t.Error(err)
		}
		if spun != want {
			t.Errorf("manner %d: spun %v", m, spun)
		}
	}
}

// The socket is told how to wait for the next request, by the length of the last
// one. A busy machine makes the device look slow now and then, so there are many
// tries.
func TestSocketIsToldTheManner(t *testing.T) {
	l := listen(t, "tcp")
	server := &Server{Exporter: oneDevice{cheapDevice(1 << 20)}}
	serveOn(t, server, l)
	client := dialGo(t, l)
	told := func() manner {
		server.mu.Lock()
		defer server.mu.Unlock()
		for c := range server.conns {
			return manner(c.socket.manner.Load())
		}
		return -1
	}
	for _, tt := range []struct {
		length int
		want   manner
	}{{4096, eagerly}, {64 << 10, patiently}, {512, eagerly}} {
		p := make([]byte, tt.length)
		for tries := 10 * retryEvery; told() != tt.want; tries-- {
			if tries == 0 {
				t.Fatalf("reads of %d bytes: it waits in manner %d, want %d", tt.length, told(), tt.want)
			}
			if _, err := client.ReadAt(p, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// Spinning in vain is not repeated until a wait was short again.
func TestSpinGivesUp(t *testing.T) {
	s, peer := eager(t)
	longAgo := time.Now().Add(-maxSpin)
	if s.spin(longAgo) || s.spins {
		t.Error("spins on for a peer that is not worth it")
	}
	arrive(t, s, peer)
	if s.spin(time.Now()) {
		t.Error("spins after it was in vain")
	}
	begin := time.Now().Add(time.Hour) // so that the wait was short, however slow the machine
	if ready, err := s.waitBusily(&s.reading, begin, time.Time{}); !ready || err != nil || !s.spins {
		t.Errorf("after a short wait: got ready %v, %v, spins %v", ready, err, s.spins)
	}
	if ready, err := s.waitBusily(&s.reading, longAgo, time.Time{}); !ready || err != nil || s.spins {
		t.Errorf("after a long wait: got ready %v, %v, spins %v", ready, err, s.spins)
	}
}

// One connection at a time: there may be no more than two processors.
func TestSpinIsForOne(t *testing.T) {
	s, peer := eager(t)
	arrive(t, s, peer)
	spinners.Store(1)
	defer spinners.Store(0)
	if s.spin(time.Now()) {
		t.Error("two readers spin at a time")
	}
	if !s.spins {
		t.Error("who had no chance to spin does not try again")
	}
}

// Only who reads little at a time from a fast device is waited for eagerly.
func TestMannerOfWaiting(t *testing.T) {
	for _, tt := range []struct {
		name string
		last uint64
		slow bool
		want manner
	}{
		{"small reads", 4096, false, eagerly},
		{"the largest of them", 16 << 10, false, eagerly},
		{"bulk", 64 << 10, false, patiently},
		{"slow device", 4096, true, calmly},
	} {
		tr := &transmission{last: tt.last}
		tr.turn.slow.Store(tt.slow)
		if got := tr.manner(); got != tt.want {
			t.Errorf("%s: got %v, want %v", tt.name, got, tt.want)
		}
	}
}
