// Package pagecache keeps the export of a large disk from pushing everything
// else out of the page cache: what sequential readers have left behind is
// dropped, but only what they have brought in themselves. A file that was cached
// before stays cached.
package pagecache

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	// window is the unit of dropping.
	window = 8 << 20
	// ahead is how many windows before it is read one is looked at: the kernel
	// reads ahead, and what it has brought in for us must not count as cached
	// before.
	ahead = 4
	// lag is how many windows that have been read are kept: their pages may still
	// be on the way to a socket, and those cannot be dropped.
	lag = 4
	// maxOpen bounds the windows that are watched at a time. The oldest is given
	// up: its pages stay, as they would without this package.
	maxOpen = 64
	// worthwhile is the shortest read that is noted: bulk readers ask for more,
	// and the others should not pay for this.
	worthwhile = 64 << 10
)

// Trail follows the reads of one open file or block device. Its methods may be
// called concurrently. It needs no closing; the file must be open when Read is
// called.
type Trail struct {
	fd    int
	size  int64
	blind atomic.Bool // nobody tells what is cached, so nothing is dropped

	mu   sync.Mutex
	open map[int64]*progress // by number of the window
	age  []int64             // the keys of open, oldest first
	done []int64             // read, to be dropped, oldest first
}

// progress is how much of a window has been read.
type progress struct {
	bytes int64
	ours  bool // it was not cached when it was looked at
}

// NewTrail follows the file with that descriptor, which has size bytes. It also
// tells the kernel that reads will be sequential: it reads ahead further.
func NewTrail(fd int, size int64) *Trail {
	_ = unix.Fadvise(fd, 0, 0, unix.FADV_SEQUENTIAL) // advice
	return &Trail{fd: fd, size: size, open: make(map[int64]*progress)}
}

// Read notes that n bytes at off have been read.
func (t *Trail) Read(off, n int64) {
	if n < worthwhile || t.blind.Load() {
		return
	}
	for _, w := range t.note(off, n) {
		_ = unix.Fadvise(t.fd, w*window, window, unix.FADV_DONTNEED) // advice
	}
}

// note returns the windows that are to be dropped now.
func (t *Trail) note(off, n int64) []int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	for n > 0 {
		w := off / window
		end := min((w+1)*window, t.size)
		part := min(n, end-off)
		if part <= 0 {
			break // behind the end that it had
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

// begin watches a window whose begin is being read, and those ahead of it. What
// else is read of a disk is not in sequence, or is little: readers that share a
// disk may come to a window from different sides, so most of it is enough.
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

// close ends the watching of a window.
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

// cached reports whether the byte at off is in the page cache, or nobody knows.
func (t *Trail) cached(off int64) bool {
	resident, err := Resident(t.fd, off)
	if err != nil {
		t.blind.Store(true)
	}
	return resident || err != nil
}
