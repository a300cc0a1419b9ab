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
