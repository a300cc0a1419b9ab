package sock

import (
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"time"
)

// connected returns both ends of a TCP connection.
func connected(t *testing.T) (near, far net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if far, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { far.Close() })
	if near, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.Close() })
	return near, far
}

// Meter counts the bytes that the peer has acknowledged and sent, and no others.
func TestMeter(t *testing.T) {
	const total = 64 << 20
	near, far := connected(t)
	m := NewMeter(near)
	await := func(what string, cond func() bool) {
		t.Helper()
		for begin := time.Now(); !cond(); time.Sleep(time.Millisecond) {
			if time.Since(begin) > 30*time.Second {
				t.Fatal(what)
			}
		}
	}
	if _, err := far.Write(make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	begin := int64(0)
	await("the bytes that the peer sent are not counted", func() bool {
		n, known := m.Progress()
		begin = n
		return known && n >= 100
	})

	// A peer that does not read: the socket takes some megabytes at most.
	var sent atomic.Int64
	done := make(chan error, 1)
	go func() {
		b := make([]byte, 64<<10)
		for range 1024 {
			n, err := near.Write(b)
			sent.Add(int64(n))
			m.Add(int64(n))
			if err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	await("the socket takes all bytes although the peer reads none", func() bool {
		before, n := sent.Load(), m.Total()
		time.Sleep(200 * time.Millisecond)
		return before > 0 && sent.Load() == before && m.Total() == n
	})
	stuck, _ := m.Progress()
	if taken, unsent := m.Total(), sent.Load()-m.Total(); unsent <= 0 || taken > stuck-begin+64<<10 {
		t.Errorf("%d bytes taken, %d not, with %d acknowledged; the peer has read nothing", taken, unsent, stuck-begin)
	}
	if again, _ := m.Progress(); again != stuck {
		t.Error("progress although the peer did nothing")
	}

	b := make([]byte, 64<<10)
	for n := int64(0); n < total; {
		got, err := far.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		n += int64(got)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	await("the bytes that the peer read are not counted", func() bool {
		n, _ := m.Progress()
		return m.Total() == total && n >= begin+total
	})
	near.Close()
	if m.Total() != total {
		t.Error("another total after the end")
	}
	if _, err := near.Write(b); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v", err)
	}
}
