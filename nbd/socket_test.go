//go:build linux

package nbd

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// socketPair returns a socket in one of its two states, and its peer.
func socketPair(t *testing.T, network string, busy bool) (*socket, net.Conn) {
	t.Helper()
	l := listen(t, network)
	defer l.Close()
	peer, err := net.Dial(network, l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	nc, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	s := newSocket(nc)
	if s == nil {
		t.Fatal("no socket")
	}
	if busy {
		s.getBusy()
	}
	t.Cleanup(func() { s.Close(); peer.Close() })
	return s, peer
}

// forSockets runs a test for both kinds of sockets in both states.
func forSockets(t *testing.T, test func(t *testing.T, s *socket, peer net.Conn)) {
	for _, network := range []string{"tcp", "unix"} {
		for _, busy := range []bool{false, true} {
			state := map[bool]string{false: "idle", true: "busy"}[busy]
			t.Run(network+"/"+state, func(t *testing.T) {
				s, peer := socketPair(t, network, busy)
				test(t, s, peer)
			})
		}
	}
}

// Both directions at once, far more than the kernel buffers: every byte arrives.
func TestSocketTransfers(t *testing.T) {
	forSockets(t, func(t *testing.T, s *socket, peer net.Conn) {
		data := patternOf(0, 16<<20+5)
		sent := make(chan error, 2)
		go func() {
			err := s.writeAll(data[:1], nil, data[1:5], data[5:])
			sent <- err
		}()
		go func() {
			_, err := peer.Write(data)
			sent <- err
		}()
		received := make(chan []byte, 2)
		for _, r := range []io.Reader{s, peer} {
			go func() {
				got := make([]byte, len(data))
				n, _ := io.ReadFull(r, got)
				received <- got[:n]
			}()
		}
		for range 2 {
			if !bytes.Equal(<-received, data) {
				t.Error("other bytes arrived")
			}
			if err := <-sent; err != nil {
				t.Error(err)
			}
		}
		peer.Close()
		if n, err := s.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
			t.Errorf("after the peer's end: got %d, %v, want EOF", n, err)
		}
	})
}

// A deadline that comes while somebody reads ends that, and one in the past ends
// reads even of what has arrived: stopping depends on it.
func TestSocketDeadlines(t *testing.T) {
	forSockets(t, func(t *testing.T, s *socket, peer net.Conn) {
		ended := make(chan error)
		go func() {
			_, err := s.Read(make([]byte, 1))
			ended <- err
		}()
		s.SetReadDeadline(aLongTimeAgo)
		if err := <-ended; !isTimeout(err) {
			t.Errorf("got %v, want a timeout", err)
		}
		if _, err := peer.Write([]byte{1}); err != nil {
			t.Fatal(err)
		}
		if n, err := s.Read(make([]byte, 1)); !isTimeout(err) {
			t.Errorf("with a deadline in the past: got %d, %v, want a timeout", n, err)
		}
		s.SetReadDeadline(time.Time{})
		if n, err := s.Read(make([]byte, 1)); n != 1 || err != nil {
			t.Errorf("got %d, %v, want the byte", n, err)
		}
		begin := time.Now()
		s.SetReadDeadline(begin.Add(3 * busyWait))
		if _, err := s.Read(make([]byte, 1)); !isTimeout(err) || time.Since(begin) < 3*busyWait {
			t.Errorf("got %v after %v, want a timeout after %v", err, time.Since(begin), 3*busyWait)
		}
	})
}

// A deadline that is set just before a wait begins is not overruled by the one
// before: who set it wants the wait to end.
func TestSocketDeadlineRace(t *testing.T) {
	s, _ := socketPair(t, "tcp", false)
	ended := make(chan error, 1)
	s.mu.Lock()
	go func() { ended <- s.waitIdly(&s.reading, time.Now()) }()
	awaitLocker(t, "beginIdling")
	// setDeadline, with the lock held.
	s.reading.deadline.Store(aLongTimeAgo.UnixNano())
	err := s.pollUntil(&s.reading, aLongTimeAgo)
	s.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if !isTimeout(err) {
			t.Errorf("got %v, want a timeout", err)
		}
	case <-time.After(30 * time.Second):
		t.Error("the deadline was lost")
	}
}

// awaitLocker waits until some goroutine waits for a mutex in a function.
func awaitLocker(t *testing.T, function string) {
	t.Helper()
	stacks := make([]byte, 1<<20)
	for t.Context().Err() == nil {
		n := runtime.Stack(stacks, true)
		for stack := range strings.SplitSeq(string(stacks[:n]), "\n\n") {
			if strings.Contains(stack, "sync.Mutex.Lock") && strings.Contains(stack, function) {
				return
			}
		}
		runtime.Gosched()
	}
}

// A peer that takes nothing is not waited for longer than it was said.
func TestSocketPatience(t *testing.T) {
	forSockets(t, func(t *testing.T, s *socket, _ net.Conn) {
		s.within(4 * busyWait)
		if _, err := s.Write(make([]byte, 32<<20)); !isTimeout(err) {
			t.Errorf("got %v, want a timeout", err)
		}
	})
}

// Closing ends what is under way, and gives every descriptor back.
func TestSocketCloses(t *testing.T) {
	forSockets(t, func(t *testing.T, s *socket, peer net.Conn) {
		ended := make(chan error)
		go func() {
			_, err := s.Read(make([]byte, 1))
			ended <- err
		}()
		go func() {
			_, err := s.Write(make([]byte, 32<<20))
			ended <- err
		}()
		if _, err := io.ReadFull(peer, make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
		fd := s.fd
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		for range 2 {
			if err := <-ended; !errors.Is(err, net.ErrClosed) && !errors.Is(err, io.EOF) {
				t.Errorf("got %v, want ErrClosed", err)
			}
		}
		if _, err := s.Write([]byte{1}); !errors.Is(err, net.ErrClosed) {
			t.Errorf("write after the end: got %v", err)
		}
		if err := s.SetReadDeadline(time.Now()); !errors.Is(err, net.ErrClosed) {
			t.Errorf("deadline after the end: got %v", err)
		}
		if _, err := os.Readlink(filepath.Join("/proc/self/fd", strconv.Itoa(fd))); err == nil && s.users > 0 {
			t.Errorf("descriptor %d is open and %d calls use it", fd, s.users)
		}
		// The peer sees the end.
		if _, err := io.Copy(io.Discard, peer); err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Error(err)
		}
	})
}

// A socket with little to do goes back to Go's poller, and leaves it when it is
// busy.
func TestSocketStates(t *testing.T) {
	s, peer := socketPair(t, "tcp", true)
	read := make(chan error, 1)
	go func() {
		_, err := s.Read(make([]byte, 1))
		read <- err
	}()
	for s.isBusy() { // until nothing has happened for long enough
		yieldNow()
	}
	s.SetReadDeadline(aLongTimeAgo)
	if err := <-read; !isTimeout(err) {
		t.Fatalf("got %v, want a timeout", err)
	}
	s.SetReadDeadline(time.Time{})
	b := make([]byte, 1)
	for range 100_000 {
		arrive(t, s, peer)
		if err := s.wait(&s.reading); err != nil {
			t.Fatal(err)
		}
		if s.isBusy() {
			return
		}
		if _, err := s.Read(b); err != nil {
			t.Fatal(err)
		}
	}
	t.Error("a socket that is asked all the time does not count as busy")
}

// A socket that gets busy again and again without being asked much gets it less and
// less easily, until it was worth it once.
func TestSocketGetsBusyLessEasily(t *testing.T) {
	s, peer := socketPair(t, "tcp", true)
	for _, want := range []int32{8, 16, 32, 64, 64} {
		getIdle(t, s)
		if got := s.needed.Load(); got != want {
			t.Fatalf("it takes %d short waits to get busy, want %d", got, want)
		}
		// A wait may be long on a busy machine, and the counting begins again.
		for last := int32(0); !s.isBusy(); last = s.short.Load() + 1 {
			arrive(t, s, peer)
			if err := s.wait(&s.reading); err != nil {
				t.Fatal(err)
			}
			if s.isBusy() && last != want {
				t.Fatalf("busy after %d short waits, want %d", last, want)
			}
		}
	}
	for range worthIt {
		arrive(t, s, peer)
		if err := s.wait(&s.reading); err != nil {
			t.Fatal(err)
		}
	}
	getIdle(t, s)
	if got := s.needed.Load(); got != shortWaits {
		t.Errorf("it takes %d short waits to get busy after it was worth it, want %d", got, shortWaits)
	}
}

// getIdle puts a socket into Go's poller, as a wait does that takes too long.
func getIdle(t *testing.T, s *socket) {
	t.Helper()
	if _, err := s.beginIdling(&s.reading, time.Now()); err != nil {
		t.Fatal(err)
	}
	s.endIdling()
}

// Who comes too late is hung up on, whatever became of the connection's descriptor
// by then.
func TestSocketIsNotLeftOpen(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	peer, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	nc, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{Exporter: cheapExporter{}}
	if err := s.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.ServeConn(t.Context(), nc); !errors.Is(err, ErrServerClosed) {
		t.Errorf("got %v, want ErrServerClosed", err)
	}
	peer.SetReadDeadline(time.Now().Add(30 * time.Second))
	if _, err := peer.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the peer got %v, want EOF", err)
	}
}
