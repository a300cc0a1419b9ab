package nbdfile

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

// writable is everything that a file opened for writing can do; those that are
// not opened so, and block devices, can do parts of it.
type writable interface {
	nbd.Device
	nbd.BlockSizer
	nbd.Flusher
	nbd.Trimmer
	nbd.ZeroWriter
	nbd.Cacher
	nbd.MultiConner
	WriteAt(p []byte, off int64) (int, error)
}

// makeFile makes a file with that content.
func makeFile(t testing.TB, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// makeSparse makes a file of holes with data in the given ranges.
func makeSparse(t testing.TB, size int64, ranges ...[2]int64) string {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for _, r := range ranges {
		if _, err := f.WriteAt(nbdtest.Bytes(int(r[1]-r[0]), r[0], 1), r[0]); err != nil {
			t.Fatal(err)
		}
	}
	return f.Name()
}

// open opens a device that is closed at the end of the test, if not before.
func open(t testing.TB, path string, opts Options) nbd.Device {
	t.Helper()
	d, err := Open(path, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// openForTest opens for writing, and closes at the end.
func openForTest(t testing.TB, path string) writable {
	t.Helper()
	d := open(t, path, Options{})
	t.Cleanup(func() { d.Close() })
	return d.(writable)
}

// contentOf reads a whole file behind the device's back.
func contentOf(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// names lists the extents as text: D for data, H for holes that read as zeroes.
func names(extents []wire.Extent) string {
	var parts []string
	for _, e := range extents {
		kind := map[uint64]string{0: "D", wire.StateHole | wire.StateZero: "H"}[e.Status]
		if kind == "" {
			kind = fmt.Sprintf("status %#x ", e.Status)
		}
		parts = append(parts, fmt.Sprintf("%s%d", kind, e.Length))
	}
	return strings.Join(parts, " ")
}
