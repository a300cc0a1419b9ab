package pagecache

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// newFile makes a file whose pages are on disk, so that they can be dropped. It skips the test
// if the file system keeps its pages.
func newFile(t *testing.T, size int64) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	b := make([]byte, 1<<20)
	for i := range b {
		b[i] = byte(i)
	}
	for off := int64(0); off < size; off += int64(len(b)) {
		if _, err := f.WriteAt(b[:min(int64(len(b)), size-off)], off); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	evict(t, f, size)
	if resident(t, f, size) != 0 {
		t.Skip("this file system keeps its pages: nothing can be dropped")
	}
	return f
}

func evict(t *testing.T, f *os.File, size int64) {
	t.Helper()
	if err := unix.Fadvise(int(f.Fd()), 0, size, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
}

// resident returns the number of bytes of a file that are in the page cache.
func resident(t *testing.T, f *os.File, size int64) (n int64) {
	t.Helper()
	page := int64(os.Getpagesize())
	for off := int64(0); off < size; off += page {
		there, err := Resident(int(f.Fd()), off)
		if err != nil {
			t.Fatal(err)
		}
		if there {
			n += page
		}
	}
	return n
}

func read(t *testing.T, f *os.File, trail *Trail, off, n int64) {
	t.Helper()
	if _, err := f.ReadAt(make([]byte, n), off); err != nil {
		t.Fatal(err)
	}
	trail.Read(off, n)
}

// TestDropsOwnPages: behind a sequential reader at most lag windows stay cached.
func TestDropsOwnPages(t *testing.T) {
	const size = 10 * window
	f := newFile(t, size)
	trail := NewTrail(int(f.Fd()), size)
	for off := int64(0); off < size; off += 1 << 20 {
		read(t, f, trail, off, 1<<20)
	}
	if got := resident(t, f, size); got > lag*window {
		t.Errorf("%d MiB are cached after reading %d MiB, want at most %d", got>>20, size>>20, lag*window>>20)
	}
}

// TestKeepsCachedPages: pages that were cached before stay.
func TestKeepsCachedPages(t *testing.T) {
	const size = 10 * window
	f := newFile(t, size)
	// The kernel may reclaim pages at any time. A Trail that drops these pages does so in
	// every attempt.
	var before, after int64
	for range 5 {
		if _, err := f.ReadAt(make([]byte, size), 0); err != nil {
			t.Fatal(err)
		}
		before = resident(t, f, size)
		trail := NewTrail(int(f.Fd()), size)
		for off := int64(0); off < size; off += 1 << 20 {
			read(t, f, trail, off, 1<<20)
		}
		if after = resident(t, f, size); after >= before {
			return
		}
	}
	t.Errorf("%d MiB are cached, %d were before", after>>20, before>>20)
}

// TestInterleavedReaders: the reads of several readers that share a disk are added up.
func TestInterleavedReaders(t *testing.T) {
	const size, block = 10 * window, 2 << 20
	f := newFile(t, size)
	trail := NewTrail(int(f.Fd()), size)
	for i := int64(0); i < size/block; i += 4 {
		for _, j := range []int64{2, 0, 3, 1} {
			read(t, f, trail, (i+j)*block, block)
		}
	}
	if got := resident(t, f, size); got > lag*window {
		t.Errorf("%d MiB are cached, want at most %d", got>>20, lag*window>>20)
	}
}

// TestNote: the windows that are dropped, and when, without a file.
func TestNote(t *testing.T) {
	trail := &Trail{fd: -1, size: 20 * window, open: make(map[int64]*progress)}
	mark := func(w int64) { trail.open[w] = &progress{ours: true}; trail.age = append(trail.age, w) }
	for w := range int64(20) {
		mark(w)
	}
	var dropped []int64
	for w := range int64(7) {
		dropped = append(dropped, trail.note(w*window, window/2)...)
		dropped = append(dropped, trail.note(w*window+window/2, window/2)...)
	}
	if want := []int64{0, 1, 2}; !slices.Equal(dropped, want) {
		t.Errorf("dropped %d, want %d", dropped, want)
	}
	if got := trail.note(19*window, 2*window); len(got) != 1 { // also behind the end
		t.Errorf("the last window: dropped %d", got)
	}
	if got := trail.note(10*window+window/2, window/4); got != nil || len(trail.open) != 12 {
		t.Errorf("a read in the middle: dropped %d, %d windows are watched", got, len(trail.open))
	}
	// Beyond maxOpen the oldest windows are no longer watched.
	many := &Trail{fd: -1, size: 200 * window, open: make(map[int64]*progress)}
	for w := range int64(2 * maxOpen) {
		many.note(w*window, minRead)
	}
	if len(many.open) != maxOpen || len(many.age) != maxOpen || many.open[0] != nil {
		t.Errorf("%d windows are watched, want the last %d", len(many.open), maxOpen)
	}
}

// TestResident: Resident reads nothing in, and finds pages that were read.
func TestResident(t *testing.T) {
	const size = window
	f := newFile(t, size)
	for round := range 2 {
		if got := resident(t, f, size); got != 0 {
			t.Errorf("round %d: %d KiB are cached, before any read", round, got>>10)
		}
	}
	if _, err := f.ReadAt(make([]byte, 1), size/2); err != nil {
		t.Fatal(err)
	}
	if there, err := Resident(int(f.Fd()), size/2+77); !there || err != nil {
		t.Errorf("a page that was read: got %t, %v, want true", there, err)
	}
	if _, err := Resident(-1, 0); err == nil {
		t.Error("no file: no error")
	}
}
