// Package servicetest has helpers for the tests of the service and of the whole program, and
// imports neither of them.
package servicetest

import (
	"fmt"
	"net"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// Timeout is how long a test waits for an event that must happen. It only matters to tests
// that fail.
const Timeout = 2 * time.Minute

// Random returns n bytes that no compression or search for zeroes can shorten, the same for
// the same seed.
func Random(seed uint64, n int) []byte {
	b := make([]byte, n)
	x := seed*2862933555777941757 + 3037000493
	for i := range b {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		b[i] = byte(x)
	}
	return b
}

// Eventually calls look until it returns "". After Timeout it fails the test with the last
// result.
func Eventually(t *testing.T, look func() (missing string)) {
	t.Helper()
	limit := time.Now().Add(Timeout)
	for {
		missing := look()
		if missing == "" {
			return
		}
		if time.Now().After(limit) {
			t.Fatal(missing)
		}
		runtime.Gosched()
	}
}

// Lacking says which of the texts are not in text. It returns "" if all are.
func Lacking(text string, texts []string) string {
	missing := slices.DeleteFunc(slices.Clone(texts), func(want string) bool { return strings.Contains(text, want) })
	if len(missing) == 0 {
		return ""
	}
	return fmt.Sprintf("no %q in\n%s", missing, text)
}

// Systemd is the end of NOTIFY_SOCKET that systemd holds.
type Systemd struct {
	t    *testing.T
	conn *net.UnixConn
}

// NewSystemd receives the notifications of this process, and of those that it starts, from
// now on until the end of the test. The socket is in dir, whose path must be short.
func NewSystemd(t *testing.T, dir string) *Systemd {
	t.Helper()
	path := filepath.Join(dir, "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return &Systemd{t, conn}
}

// Wait returns the next message that matches.
func (s *Systemd) Wait(pattern string) string {
	s.t.Helper()
	if err := s.conn.SetReadDeadline(time.Now().Add(Timeout)); err != nil {
		s.t.Fatal(err)
	}
	b := make([]byte, 4096)
	for {
		n, err := s.conn.Read(b)
		if err != nil {
			s.t.Fatalf("waiting for %s: %v", pattern, err)
		}
		if text := string(b[:n]); regexp.MustCompile(pattern).MatchString(text) {
			return text
		}
	}
}
