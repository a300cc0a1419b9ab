// Package fsys has the file operations of programs whose files have to survive a power cut.
// They are an interface, so that package memfs can simulate a power cut at each of them,
// which loses data that is not synced.
package fsys

import (
	"errors"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// ErrLocked means that another process, or another open file of this one, has locked a file.
var ErrLocked = errors.New("in use by another instance")

// FS is a file system. Its methods may be called concurrently. They return errors of package
// io/fs where these apply.
type FS interface {
	// Mkdir makes one folder. It returns fs.ErrExist if the folder exists.
	Mkdir(path string) error
	// Lock opens the file at path for reading and writing, after making it if necessary, and
	// locks it. It returns ErrLocked at once if the file is locked. Closing the file unlocks it.
	// The file may be removed while it is locked: the next Lock makes another one.
	Lock(path string) (File, error)
	// IsLocked reports whether a process has locked the file at path. A file that does not
	// exist is not locked.
	IsLocked(path string) (bool, error)
	// Names returns the names in a folder.
	Names(path string) ([]string, error)
	// Remove removes a file.
	Remove(path string) error
	// ReadFile returns the content of a file.
	ReadFile(path string) ([]byte, error)
	// Create opens the file at path, after making it if necessary, and truncates it.
	Create(path string) (File, error)
	// Rename renames a file. A file that has the new name is replaced.
	Rename(from, to string) error
	// SyncDir makes the entries of a folder durable.
	SyncDir(path string) error
}

// File is an open file. Its data is durable after Sync. After a failed Sync it is unknown
// what is durable, and a second Sync does not make it so: Linux forgets which pages it could
// not write.
type File interface {
	io.Writer
	io.ReaderAt
	io.WriterAt
	io.Closer
	Sync() error
}

// OS is the file system of this host.
type OS struct{}

// Mkdir implements FS. The mode of the folder is 0755.
func (OS) Mkdir(path string) error { return os.Mkdir(path, 0o755) }

// Lock implements FS. The mode of a new file is 0600.
func (OS) Lock(path string) (File, error) {
	for {
		f, err := openLocked(path, os.O_CREATE|os.O_RDWR, unix.LOCK_EX|unix.LOCK_NB)
		if err != nil {
			return nil, err
		}
		current, err := isAt(f, path)
		if err == nil && current {
			return f, nil
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return nil, err
		}
	}
}

// isAt reports whether path is the name of an open file. It is not if the file was removed or
// replaced after it was opened.
func isAt(f *os.File, path string) (bool, error) {
	opened, err := f.Stat()
	if err != nil {
		return false, err
	}
	named, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && os.SameFile(opened, named), err
}

// IsLocked implements FS.
func (OS) IsLocked(path string) (bool, error) {
	// A shared lock: two processes that look at the same time do not see each other's.
	f, err := openLocked(path, os.O_RDONLY, unix.LOCK_SH|unix.LOCK_NB)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case errors.Is(err, ErrLocked):
		return true, nil
	case err != nil:
		return false, err
	}
	return false, f.Close()
}

// openLocked opens a file and locks it with flock(2). The lock belongs to the open file: it
// is held until every process that has inherited the file has closed it.
func openLocked(path string, flag, how int) (*os.File, error) {
	f, err := os.OpenFile(path, flag, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(f.Fd()), how)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err == nil {
		return f, nil
	}
	f.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, ErrLocked
	}
	return nil, os.NewSyscallError("flock", err)
}

// fileOf returns f as a File, which is nil after an error.
func fileOf(f *os.File, err error) (File, error) {
	if err != nil {
		return nil, err
	}
	return f, nil
}

// Names implements FS.
func (OS) Names(path string) ([]string, error) {
	entries, err := os.ReadDir(path)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, err
}

// Remove implements FS.
func (OS) Remove(path string) error { return os.Remove(path) }

// ReadFile implements FS.
func (OS) ReadFile(path string) ([]byte, error) { return os.ReadFile(path) }

// Create implements FS. The mode of a new file is 0644.
func (OS) Create(path string) (File, error) {
	return fileOf(os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o644))
}

// Rename implements FS.
func (OS) Rename(from, to string) error { return os.Rename(from, to) }

// SyncDir implements FS.
func (OS) SyncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
