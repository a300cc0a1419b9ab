package zerocopy

import (
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// File is an open file or block device whose parts are to be sent. Its methods may be
// called concurrently.
type File struct {
	fd       int
	verify   func(off, n int64) error
	inMemory bool        // the file has no storage but memory, so reads never wait
	blind    atomic.Bool // the file system or the kernel does not support RWF_NOWAIT
}

// NewFile returns a File for the descriptor fd, which must stay open while the File is
// used. verify is called after n bytes at off have been read, and returns an error if
// they must not be used.
func NewFile(fd int, verify func(off, n int64) error) *File {
	var fs unix.Statfs_t
	inMemory := unix.Fstatfs(fd, &fs) == nil && fs.Type == unix.TMPFS_MAGIC && isRegular(fd)
	return &File{fd: fd, verify: verify, inMemory: inMemory}
}

// isRegular reports whether fd is a regular file. The data of a block device is not in
// memory if its node is on a file system in memory.
func isRegular(fd int) bool {
	var st unix.Stat_t
	return unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG
}

// HasCache reports whether HasCached and ReadCached can find anything. It is false for a
// nil File and where the file system or the kernel does not support RWF_NOWAIT.
func (f *File) HasCache() bool { return f != nil && !f.blind.Load() }

// HasCached reports whether the last byte of a range is in the page cache. The whole range
// is, if it was read in sequence. It reads that byte into last, which is the caller's so
// that it need not be allocated.
func (f *File) HasCached(off, n int64, last *[1]byte) bool {
	return f.inMemory || f.ReadCached(last[:], off+n-1)
}

// ReadCached reads all of p at off if that does not wait for storage. Otherwise it returns
// false, also after errors: an ordinary read will return the same error. The caller must
// call Verify before it uses the data.
func (f *File) ReadCached(p []byte, off int64) bool {
	flags := unix.RWF_NOWAIT
	if f.inMemory {
		flags = 0
	}
	n, err := unix.Preadv2(f.fd, [][]byte{p}, off, flags)
	if err == unix.EOPNOTSUPP || err == unix.ENOSYS || err == unix.EINVAL {
		f.blind.Store(true)
	}
	return err == nil && n == len(p)
}

// Verify returns an error if data of this range that has been read must not be used.
func (f *File) Verify(off, n int64) error { return f.verify(off, n) }

// Fill reads n bytes at off into p, which must be empty, and verifies them. After an error p
// is empty. [ErrNoPipe] means that the data has to be read in another way.
func (f *File) Fill(p *Pipes, off int64, n int) error {
	if err := p.fill(f.fd, off, n); err != nil {
		return err
	}
	if err := f.verify(off, int64(n)); err != nil {
		p.Release()
		return err
	}
	return nil
}
