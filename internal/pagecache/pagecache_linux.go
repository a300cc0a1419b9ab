package pagecache

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	// window is the unit of dropping.
	window = 8 << 20
	// ahead is the number of windows by which the check whether a window is cached
	// precedes its read: the kernel reads ahead, and those pages must not count as cached
	// before.
	ahead = 4
	// lag is the number of windows that are kept after they were read: pages that are
	// still in a pipe or a socket buffer cannot be dropped.
	lag = 4
	// maxOpen bounds the watched windows. Beyond it the oldest is no longer watched, and
	// its pages stay.
	maxOpen = 64
	// minRead is the shortest read that counts. Bulk readers use longer ones, and other
	// readers are not slowed down.
	minRead = 64 << 10
)

// Trail records the reads of one open file or block device. Its methods may be called
// concurrently. It is not closed; the file must be open when Read is called.
type Trail struct {
	fd    int
	size  int64
	blind atomic.Bool // cached pages cannot be determined, so nothing is dropped

	mu   sync.Mutex
	open map[int64]*progress // by number of the window
	age  []int64             // the keys of open, oldest first
	done []int64             // read, to be dropped, oldest first
}

// progress is the state of a watched window.
type progress struct {
	bytes int64
	ours  bool // it was not cached before
}

// NewTrail returns a Trail of the file with that descriptor, which has size bytes. It also
// advises the kernel of sequential reads, so that it reads further ahead.
func NewTrail(fd int, size int64) *Trail {
	_ = unix.Fadvise(fd, 0, 0, unix.FADV_SEQUENTIAL) // advice
	return &Trail{fd: fd, size: size, open: make(map[int64]*progress)}
}

// Read records that n bytes at off have been read, and drops pages that are behind.
func (t *Trail) Read(off, n int64) {
	if n < minRead || t.blind.Load() {
		return
	}
	for _, w := range t.note(off, n) {
		_ = unix.Fadvise(t.fd, w*window, window, unix.FADV_DONTNEED) // advice
	}
}

// note records a read and returns the windows to be dropped.
func (t *Trail) note(off, n int64) []int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	for n > 0 {
		w := off / window
		end := min((w+1)*window, t.size)
		part := min(n, end-off)
		if part <= 0 {
			break // beyond the size at the start
		}
		if off-w*window < n {
			t.begin(w)
		}
		if p := t.open[w]; p != nil {
			p.bytes += part
			if p.bytes >= (end-w*window)/4*3 {
				t.close(w, p.ours)
			}
		}
		off, n = off+part, n-part
	}
	if len(t.done) <= lag {
		return nil
	}
	drop := append([]int64(nil), t.done[:len(t.done)-lag]...)
	t.done = append(t.done[:0], t.done[len(t.done)-lag:]...)
	return drop
}

// begin watches a window whose beginning is read, and those ahead of it. A sequential reader
// reads the beginning of every window. Three quarters of a window are enough to drop it,
// because several readers may share a disk.
func (t *Trail) begin(w int64) {
	for next := w; next <= w+ahead && next*window < t.size; next++ {
		if t.open[next] != nil {
			continue
		}
		if len(t.age) >= maxOpen {
			t.close(t.age[0], false)
		}
		t.open[next] = &progress{ours: !t.cached(min((next+1)*window, t.size) - 1)}
		t.age = append(t.age, next)
	}
}

// close stops watching a window.
func (t *Trail) close(w int64, drop bool) {
	delete(t.open, w)
	for i, other := range t.age {
		if other == w {
			t.age = append(t.age[:i], t.age[i+1:]...)
			break
		}
	}
	if drop {
		t.done = append(t.done, w)
	}
}

// cached reports whether the byte at off is in the page cache, or whether that is unknown.
func (t *Trail) cached(off int64) bool {
	resident, err := Resident(t.fd, off)
	if err != nil {
		t.blind.Store(true)
	}
	return resident || err != nil
}
