package passfd_test

import (
	"net"
	"testing"

	"golang.org/x/sys/unix"

	"xapi-nbd/internal/passfd"
)

// A listener whose descriptor was used still does not block, so that Close ends Accept.
func TestDupStaysNonblocking(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f, err := passfd.Dup(l.(*net.TCPListener))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK == 0 {
		t.Errorf("flags: got %#x, %v, want O_NONBLOCK", flags, err)
	}
	accepted := make(chan error)
	go func() {
		_, err := l.Accept()
		accepted <- err
	}()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if err := <-accepted; err == nil {
		t.Error("a closed listener accepts")
	}
	again, err := net.FileListener(f) // it goes on in the other descriptor
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
}
