package main

import (
	"bytes"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// relayed returns both ends of a relay over pipes, in fake time.
func relayed(t *testing.T, delay time.Duration) (near, far net.Conn) {
	t.Helper()
	near, nearEnd := net.Pipe()
	far, farEnd := net.Pipe()
	var done sync.WaitGroup
	done.Go(func() {
		relayBoth(nearEnd, farEnd, delay)
		nearEnd.Close()
		farEnd.Close()
	})
	t.Cleanup(func() {
		near.Close()
		far.Close()
		done.Wait()
	})
	return near, far
}

// TestRelayDelays: in both directions every byte arrives exactly the delay after it was
// sent, and the sender does not wait.
func TestRelayDelays(t *testing.T) {
	const delay = 10 * time.Millisecond
	synctest.Test(t, func(t *testing.T) {
		near, far := relayed(t, delay)
		for _, way := range []struct {
			name     string
			from, to net.Conn
		}{{"there", near, far}, {"back", far, near}} {
			begin := time.Now()
			if _, err := way.from.Write([]byte("hello")); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(begin); took != 0 {
				t.Errorf("%s: the sender was held up for %v", way.name, took)
			}
			p := make([]byte, 5)
			if _, err := io.ReadFull(way.to, p); err != nil || string(p) != "hello" {
				t.Fatalf("%s: got %q, error %v", way.name, p, err)
			}
			if took := time.Since(begin); took != delay {
				t.Errorf("%s: took %v, want %v", way.name, took, delay)
			}
		}
	})
}

// TestRelayDoesNotLimit: bytes that are sent while others are in flight have the same delay.
func TestRelayDoesNotLimit(t *testing.T) {
	const delay, pieces, apart = 50 * time.Millisecond, 1000, time.Millisecond
	synctest.Test(t, func(t *testing.T) {
		near, far := relayed(t, delay)
		begin := time.Now()
		var sender sync.WaitGroup
		defer sender.Wait()
		defer near.Close()
		sender.Go(func() {
			for i := range pieces {
				if _, err := near.Write(bytes.Repeat([]byte{byte(i)}, 4096)); err != nil {
					return // the reader has failed the test
				}
				time.Sleep(apart) // fake
			}
		})
		p := make([]byte, 4096)
		for i := range pieces {
			if _, err := io.ReadFull(far, p); err != nil || p[0] != byte(i) || p[4095] != byte(i) {
				t.Fatalf("piece %d: first byte %d, error %v", i, p[0], err)
			}
			if got, want := time.Since(begin), time.Duration(i)*apart+delay; got != want {
				t.Fatalf("piece %d after %v, want %v", i, got, want)
			}
		}
	})
}

// TestRelayPassesTheEnd: the end of a connection has the same delay as its bytes, and comes
// after them.
func TestRelayPassesTheEnd(t *testing.T) {
	const delay = 10 * time.Millisecond
	synctest.Test(t, func(t *testing.T) {
		near, far := relayed(t, delay)
		begin := time.Now()
		if _, err := near.Write([]byte("bye")); err != nil {
			t.Fatal(err)
		}
		near.Close()
		if got, err := io.ReadAll(far); err != nil || string(got) != "bye" {
			t.Errorf("got %q, error %v", got, err)
		}
		if took := time.Since(begin); took != delay {
			t.Errorf("took %v, want %v", took, delay)
		}
	})
}

// TestRelayCloses: close ends open connections and leaves no goroutine (see TestMain).
func TestRelayCloses(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	r, err := startRelay(l.Addr().String(), time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	near, err := net.Dial("tcp", r.addr())
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	if _, err := near.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(far, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	r.close()
	if n, err := far.Read(make([]byte, 1)); err == nil {
		t.Errorf("read %d bytes from a closed relay", n)
	}
	if n, err := near.Read(make([]byte, 1)); err == nil {
		t.Errorf("read %d bytes from a closed relay", n)
	}
}
