package nbdfile

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// shared is what all devices of one regular file have in common.
type shared struct {
	id    fileID
	users int // devices; guarded by files.mu

	// writing is held during a write. The kernel lets one thread at a time write to a file;
	// the others would wait in a loop, and take processor time from it.
	writing sync.Mutex

	// data is the last range without holes that was found, nil before the first search. It is
	// kept because some file systems take the longer to answer the longer the range is. If it
	// has become a hole meanwhile, calling it data is still correct.
	data atomic.Pointer[span]
	// searching is held during a search, so that others can use its result.
	searching sync.Mutex
}

// fileID identifies a file while it is open.
type fileID struct{ device, inode uint64 }

// span is a range of a file.
type span struct{ begin, end int64 }

var files = struct {
	mu   sync.Mutex
	byID map[fileID]*shared
}{byID: make(map[fileID]*shared)}

// share returns what is shared with other devices of a file. The caller calls leave.
func share(fd int) (*shared, error) {
	var st unix.Stat_t
	if err := again(func() error { return unix.Fstat(fd, &st) }); err != nil {
		return nil, err
	}
	id := fileID{uint64(st.Dev), uint64(st.Ino)}
	files.mu.Lock()
	defer files.mu.Unlock()
	s := files.byID[id]
	if s == nil {
		s = &shared{id: id}
		files.byID[id] = s
	}
	s.users++
	return s, nil
}

// leave ends the use by one device, whose file is still open.
func (s *shared) leave() {
	files.mu.Lock()
	defer files.mu.Unlock()
	if s.users--; s.users == 0 {
		delete(files.byID, s.id)
	}
}

// dataAt returns the end of the data at an offset, if it is known.
func (s *shared) dataAt(off int64) (end int64, found bool) {
	known := s.data.Load()
	if known == nil || off < known.begin || off >= known.end {
		return 0, false
	}
	return known.end, true
}

// forget is called after holes may have been made.
func (s *shared) forget() { s.data.Store(&span{}) }
