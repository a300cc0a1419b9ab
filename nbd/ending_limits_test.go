package nbd

import (
	"net"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// chatty is a connection of which the server has closed its own direction, and whose peer
// goes on sending: pieces of so many bytes, with pauses.
type chatty struct {
	net.Conn
	piece    int
	pause    time.Duration
	mu       sync.Mutex
	deadline time.Time
	read     int
}

func (c *chatty) CloseWrite() error { return nil }

func (c *chatty) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.deadline = t
	return nil
}

func (c *chatty) Read(p []byte) (int, error) {
	c.mu.Lock()
	left := time.Until(c.deadline)
	c.mu.Unlock()
	if c.pause >= left {
		time.Sleep(left)
		return 0, os.ErrDeadlineExceeded
	}
	time.Sleep(c.pause)
	n := min(c.piece, len(p))
	c.read += n
	return n, nil
}

// The bytes that a peer sends after the end are read within limits of idle time, of time, and
// of bytes.
func TestDrainIsBounded(t *testing.T) {
	tests := []struct {
		name  string
		piece int
		pause time.Duration
		took  time.Duration
		most  int // bytes
	}{
		{"silent", 1, time.Hour, hangUpQuiet, 0},
		{"a byte now and then", 1, hangUpQuiet - time.Millisecond, hangUpTime, 6},
		{"much", 32 << 10, 0, 0, hangUpBytes},
	}
	for _, tt := range tests {
		synctest.Test(t, func(t *testing.T) {
			c := &chatty{piece: tt.piece, pause: tt.pause}
			begin := time.Now()
			drain(c)
			if took := time.Since(begin); took != tt.took {
				t.Errorf("%s: took %v, want %v", tt.name, took, tt.took)
			}
			if c.read > tt.most {
				t.Errorf("%s: %d bytes were read, want at most %d", tt.name, c.read, tt.most)
			}
		})
	}
}

// endless is one end of a pipe that can close its own direction, in name only, and whose
// peer never closes.
type endless struct{ net.Conn }

func (endless) CloseWrite() error { return nil }

// A connection that has ended waits for its peer, unless too many do.
func TestManyConnectionsThatEnd(t *testing.T) {
	most := defaults.MaxConns + spareHangingUp
	for ending, want := range map[int]time.Duration{0: hangUpQuiet, most - 1: hangUpQuiet, most: 0} {
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer(t)
			s.init()
			s.mu.Lock()
			for range ending {
				s.hangingUp[new(conn)] = struct{}{}
			}
			s.mu.Unlock()
			client, server := net.Pipe()
			defer client.Close()
			ended := make(chan error, 1)
			go func() { ended <- s.ServeConn(t.Context(), endless{server}) }()
			p := &peer{t: t, nc: client}
			p.greet(fixedNoZeroes)
			p.goTo("a")
			p.disc()
			begin := time.Now()
			if err := <-ended; err != nil {
				t.Error(err)
			}
			if took := time.Since(begin); took != want {
				t.Errorf("beside %d others: closed after %v, want %v", ending, took, want)
			}
			s.mu.Lock()
			clear(s.hangingUp)
			s.mu.Unlock()
		})
	}
}
