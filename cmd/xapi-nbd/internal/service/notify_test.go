package service

import (
	"errors"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/cmd/xapi-nbd/internal/servicetest"
	"xapi-nbd/xapi/xapitest"
)

// TestNotifyWithoutAReader: a systemd that takes no notifications delays the service only by
// notifyTimeout, after which the notification is dropped.
func TestNotifyWithoutAReader(t *testing.T) {
	servicetest.NewSystemd(t, t.TempDir())
	for n := 0; ; n++ {
		err := sendToSystemd("STATUS=serving", nil)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Logf("the queue takes %d notifications", n)
			return
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestWatchdogNeedsAGreeting: the watchdog is notified only if the server sends its greeting.
func TestWatchdogNeedsAGreeting(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	s := w.make(nil)
	err := s.answers(t.Context(), 2*time.Second)
	if err == nil {
		t.Error("the self-check of a service that accepts no connection succeeds")
	}
	notified := servicetest.NewSystemd(t, w.dir)
	s.tellWatchdog(t.Context(), 2*time.Second)
	notify("END=1")
	if got := notified.Wait("."); got != "END=1" {
		t.Errorf("systemd was notified of %q", got)
	}
	if !strings.Contains(s.logged(), "self-check failed") {
		t.Errorf("the log does not say so:\n%s", s.logged())
	}
	closeAll(s.listening.open)
	if err := s.disks.Close(t.Context()); err != nil {
		t.Error(err)
	}
	s.client.Close()

	alive := w.inside(func(c *config.Config) { c.Listen = append(c.Listen, "unix:"+w.dir+"/s") })
	if err := alive.answers(t.Context(), patience); err != nil {
		t.Errorf("a service that runs: %v", err)
	}
	// The self-check succeeds behind a firewall that covers the service's own address.
	if err := alive.greets(t.Context(), deadAddr(t), patience); err != nil {
		t.Errorf("no way to the address: %v", err)
	}
	// The self-check leaves no lines in the log.
	if strings.Contains(alive.logged(), "handshake ended without") {
		t.Errorf("the log holds its visit:\n%s", alive.logged())
	}
}

// deadAddr returns the address of a port without a listener, until the end of the test.
func deadAddr(t *testing.T) net.Addr {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: name.(*unix.SockaddrInet4).Port}
}
