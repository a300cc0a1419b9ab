package blockdev

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"xapi-nbd/internal/pagecache"
)

// directDevice opens a file for direct reads. The file is not on a file system in memory,
// which has no storage besides the page cache.
func directDevice(t *testing.T, data []byte) *Device {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "direct")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "image")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := Open(t.Context(), path, Options{Direct: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(d.f.Fd()), &fs); err != nil {
		t.Fatal(err)
	}
	if !d.Direct() || fs.Type == unix.TMPFS_MAGIC { // which says yes since 6.6 and has only memory
		t.Skip("the file system below /var/tmp cannot read past the page cache")
	}
	return d
}

// All ranges are read completely: aligned or not, longer than the buffer, and up to an
// unaligned end.
func TestDirectReads(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	data := make([]byte, 1<<20+512+77)
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	d := directDevice(t, data)
	size := len(data)
	aligned := *directBuffers.Get().(*[]byte)
	for round := range 500 {
		off, n := r.IntN(size), r.IntN(2*directBounce)+1
		if round%3 == 0 {
			off, n = off&^(directUnit-1), max(n&^(directUnit-1), directUnit)
		}
		p := make([]byte, n)
		if round%2 == 0 && n <= len(aligned) {
			p = aligned[:n]
		}
		want := data[off:min(off+n, size)]
		got, err := d.ReadAt(p, int64(off))
		if got != len(want) || !bytes.Equal(p[:got], want) {
			t.Fatalf("%d bytes at %d: got %d, or other ones", n, off, got)
		}
		if short := got < n; short != errors.Is(err, io.EOF) || err != nil && !short {
			t.Fatalf("%d bytes at %d of %d: got %v", n, off, size, err)
		}
	}
}

// A device that needs a larger alignment than its sectors is read through a buffer, without
// an EINVAL for the caller.
func TestDirectNeedsLargerAlignment(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789abcdef"), 2*directUnit/16)
	d := directDevice(t, data)
	d.unit.Store(1) // less than any device takes
	p := make([]byte, len(data)+1)[1:]
	if n, err := d.ReadAt(p, 0); n != len(data) || err != nil || !bytes.Equal(p, data) {
		t.Errorf("got %d bytes, %v, want all %d of them", n, err, len(data))
	}
	if got := d.unit.Load(); got != directUnit {
		t.Errorf("reads go on in units of %d bytes, want %d", got, directUnit)
	}
}

// Data of direct reads is not in the page cache afterwards.
func TestDirectLeavesThePageCacheAlone(t *testing.T) {
	d := directDevice(t, make([]byte, 1<<20))
	fd := int(d.f.Fd())
	if err := d.f.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	if _, err := d.ReadAt(make([]byte, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	if cached, err := pagecache.Resident(fd, 1<<19); cached || err != nil {
		t.Errorf("the middle of the file: in the page cache %t, %v, want it not there", cached, err)
	}
}

// A device for direct reads has no File, because splice would use the page cache.
func TestDirectHasNoFile(t *testing.T) {
	if d := directDevice(t, make([]byte, 4096)); d.File() != nil {
		t.Error("its file is given away")
	}
}
