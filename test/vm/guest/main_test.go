package guest

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestMain runs no test outside of a guest, because the tests use the whole machine. TestXen
// and TestKernel of package vm run them.
func TestMain(m *testing.M) {
	if os.Getenv("VM_GUEST") == "" {
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// patience bounds every wait of these tests; nothing is expected to take it.
const patience = 2 * time.Minute

// program is the path of a program that was brought along.
func program(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs(name)
	if err == nil {
		_, err = os.Stat(path)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// must runs a program, which must succeed, and returns its output.
func must(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := run(t.Context(), name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// mustSucceed runs a command whose arguments are not for logs.
func mustSucceed(t *testing.T, cmd *exec.Cmd, secret string) {
	t.Helper()
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", filepath.Base(cmd.Path), err, strings.ReplaceAll(string(out), secret, "<session>"))
	}
}

// logPeer logs the version of a peer.
func logPeer(t *testing.T, name, version string) {
	t.Helper()
	line, _, _ := strings.Cut(strings.TrimSpace(version), "\n")
	t.Logf("peer: %s %s", name, line)
}

// logClientPeers logs the versions of the programs from Debian.
func logClientPeers(t *testing.T, programs ...string) {
	t.Helper()
	for _, name := range programs {
		out, err := exec.Command(name, "--version").CombinedOutput()
		if err != nil {
			t.Errorf("%s --version: %v", name, err)
			continue
		}
		logPeer(t, name, strings.TrimPrefix(string(out), name+" "))
	}
}

// readFile returns a small file of the kernel's, without the newline.
func readFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(data))
}

// wantFile compares a small file of the kernel's.
func wantFile(t *testing.T, path, want string) {
	t.Helper()
	if got := readFile(t, path); got != want {
		t.Errorf("%s: got %q, want %q", path, got, want)
	}
}

// diskContent is data for a disk of 16 MiB and one sector: some that is random,
// the same for the same seed, and zeroes between.
func diskContent(seed uint64, sectorSize int) []byte {
	data := make([]byte, 16<<20+sectorSize)
	random := rand.NewChaCha8([32]byte{0: byte(seed), 1: byte(sectorSize >> 8)})
	for _, part := range [][]byte{data[:5<<20], data[11<<20:]} {
		_, _ = random.Read(part) // never fails
	}
	return data
}

// wantSame compares without printing megabytes.
func wantSame(t *testing.T, name string, got, want []byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("%s: got %d bytes, want %d", name, len(got), len(want))
		return
	}
	if !bytes.Equal(got, want) {
		t.Error(name + ": " + firstDifference(got, want))
	}
}

func firstDifference(got, want []byte) string {
	for i := range want {
		if got[i] != want[i] {
			return fmt.Sprintf("byte %d differs, got %#x, want %#x", i, got[i], want[i])
		}
	}
	return "no difference"
}
