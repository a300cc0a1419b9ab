package nbd

import (
	"errors"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// fileCache tells what of a device's file is in the page cache, so that reads
// which need not wait for storage are served without a hand-over, and others
// never hold up the next ones. Its methods may be called concurrently.
type fileCache struct {
	fd     int
	check  func(off, n int64) error
	memory bool        // the page cache is all there is of the file
	blind  atomic.Bool // the file system or the kernel does not tell
}

// newFileCache returns nil for a device that is no file.
func newFileCache(can capabilities) *fileCache {
	if can.file == nil {
		return nil
	}
	c := &fileCache{fd: int(can.file.File().Fd()), check: can.file.Verify}
	var fs unix.Statfs_t
	c.memory = unix.Fstatfs(c.fd, &fs) == nil && fs.Type == unix.TMPFS_MAGIC && isRegular(c.fd)
	return c
}

// isRegular: a device node may lie on a file system in memory, its data does not.
func isRegular(fd int) bool {
	var st unix.Stat_t
	return unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG
}

// sees reports whether the page cache can be asked.
func (c *fileCache) sees() bool { return c != nil && !c.blind.Load() }

// has reports whether the end of a range is cached. If it was read in sequence,
// the rest of the range is too. It reads the last byte to last.
func (c *fileCache) has(off, n int64, last *[1]byte) bool {
	return c.memory || c.read(last[:], off+n-1) == nil
}

// verify must be called after read, see FileBacked.
func (c *fileCache) verify(off, n int64) error { return c.check(off, n) }

// errNotCached: reading has to wait for storage.
var errNotCached = errors.New("not in the page cache")

// read reads all of p without waiting, or fails with errNotCached, which is also
// the answer to every other trouble: reading in the ordinary way will tell.
func (c *fileCache) read(p []byte, off int64) error {
	flags := unix.RWF_NOWAIT
	if c.memory {
		flags = 0
	}
	n, err := unix.Preadv2(c.fd, [][]byte{p}, off, flags)
	if err == unix.EOPNOTSUPP || err == unix.ENOSYS || err == unix.EINVAL {
		c.blind.Store(true)
	}
	if err != nil || n != len(p) {
		return errNotCached
	}
	return nil
}
