package nbdfile

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// maxSpans is how many ranges of data are remembered of a file: about one for each client that
// reads a range of its own.
const maxSpans = 8

// shared is what all devices of one regular file have in common.
type shared struct {
	id    fileID
	users int // devices; guarded by files.mu

	// writing is held during a write if turns is set. Then the kernel lets one thread at a time
	// write to the file; the others would wait in a loop, and take processor time from it.
	writing sync.Mutex
	turns   bool

	// data has the last ranges without holes that were found, the newest first; nil before the
	// first search. They are kept because some file systems take the longer to answer the
	// longer the range is. If one has become a hole meanwhile, calling it data is still
	// correct; a hole that another program made stays unknown while the file is open.
	data atomic.Pointer[[]span]
	// searching is held during the first search, so that others can use its result.
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
		s = &shared{id: id, turns: takesTurns(fd)}
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
	if known := s.data.Load(); known != nil {
		for _, k := range *known {
			if k.begin <= off && off < k.end {
				return k.end, true
			}
		}
	}
	return 0, false
}

// remember adds a range of data that was found after known was loaded. It does nothing if data
// has changed since then: a hole may have been made in the range.
func (s *shared) remember(known *[]span, found span) {
	all := []span{found}
	if known != nil {
		all = append(all, (*known)[:min(len(*known), maxSpans-1)]...)
	}
	s.data.CompareAndSwap(known, &all)
}

// forget is called after holes may have been made.
func (s *shared) forget() { s.data.Store(&[]span{}) }

// takesTurns reports whether the kernel copies one write after the other into the page cache. It
// is not so where a write waits for storage: then several may wait at the same time.
func takesTurns(fd int) bool {
	const syncFlag = 0x8 // FS_SYNC_FL: chattr +S
	var st unix.Statfs_t
	if err := again(func() error { return unix.Fstatfs(fd, &st) }); err != nil || st.Flags&unix.ST_SYNCHRONOUS != 0 {
		return false
	}
	switch uint32(st.Type) {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.TMPFS_MAGIC:
	default:
		return false
	}
	flags, err := unix.IoctlGetUint32(fd, unix.FS_IOC_GETFLAGS)
	return err != nil || flags&syncFlag == 0 // tmpfs of older kernels has no flags
}
