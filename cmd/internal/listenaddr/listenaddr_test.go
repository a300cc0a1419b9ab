package listenaddr_test

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"xapi-nbd/cmd/internal/listenaddr"
)

func TestSplit(t *testing.T) {
	for _, tt := range []struct {
		addr, network, address string // no network is an error
	}{
		{"localhost:1", "tcp", "localhost:1"},
		{"[::1]:10809", "tcp", "[::1]:10809"},
		{"[fe80::1%eth0]:0", "tcp", "[fe80::1%eth0]:0"},
		{":1", "tcp", ":1"},
		{"unix:/run/s", "unix", "/run/s"},
		{addr: "unix:"}, {addr: "here"}, {addr: "::1:1"}, {addr: "h:nbd"}, {addr: "h:65536"}, {addr: "h:"}, {addr: ""},
	} {
		network, address, err := listenaddr.Split(tt.addr)
		if network != tt.network || address != tt.address || (err == nil) != (tt.network != "") {
			t.Errorf("%q: got %q, %q, %v", tt.addr, network, address, err)
		}
	}
}

// socketPath is in a folder whose name is short enough for a socket.
func socketPath(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "listenaddr")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}

// TestStaleSocketIsReplaced: the socket of a killed process is replaced.
func TestStaleSocketIsReplaced(t *testing.T) {
	path := socketPath(t)
	killed, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	killed.SetUnlinkOnClose(false)
	if err := killed.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Fatal(err) // nothing would be tested
	}
	l, err := listenaddr.Listen(t.Context(), "unix:"+path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

func TestLiveSocketIsKept(t *testing.T) {
	path := socketPath(t)
	l, err := listenaddr.Listen(t.Context(), "unix:"+path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := listenaddr.Listen(t.Context(), "unix:"+path); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("got error %v, want EADDRINUSE", err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the socket of the first: %v", err)
	}
}

// TestSocketWithFullBacklogIsKept: connections to a busy process may fail too.
func TestSocketWithFullBacklogIsKept(t *testing.T) {
	path := socketPath(t)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	first, err := net.Dial("unix", path) // fills a backlog of 0
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	if _, err := net.Dial("unix", path); !errors.Is(err, syscall.EAGAIN) {
		t.Fatalf("got error %v, want EAGAIN of a full backlog", err)
	}
	if _, err := listenaddr.Listen(t.Context(), "unix:"+path); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("got error %v, want EADDRINUSE", err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the socket of the busy process: %v", err)
	}
}

// TestOtherFilesAreKept: a file that is not a socket is not removed.
func TestOtherFilesAreKept(t *testing.T) {
	path := socketPath(t)
	if err := os.WriteFile(path, []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listenaddr.Listen(t.Context(), "unix:"+path); err == nil {
		t.Error("listening on a file: no error")
	}
	if st, err := os.Lstat(path); err != nil || st.Mode().Type() != fs.FileMode(0) {
		t.Errorf("the file: got %v, %v", st, err)
	}
}

// TestZones listens on a link-local address, which has a zone.
func TestZones(t *testing.T) {
	interfaces, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range interfaces {
		addrs, err := i.Addrs()
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range addrs {
			n, ok := a.(*net.IPNet)
			if !ok || n.IP.To4() != nil || !n.IP.IsLinkLocalUnicast() {
				continue
			}
			l, err := listenaddr.Listen(t.Context(), "["+n.IP.String()+"%"+i.Name+"]:0")
			if err != nil {
				t.Fatal(err)
			}
			l.Close()
			return
		}
	}
	t.Skip("needs an interface with a link-local IPv6 address")
}
