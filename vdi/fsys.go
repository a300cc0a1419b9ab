package vdi

import (
	"errors"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// fsys has the operations of a file system that the journal uses. It is an interface so
// that tests can simulate a power cut at every operation, which loses unsynced data.
type fsys interface {
	// mkdir makes one folder. It returns fs.ErrExist if the folder exists.
	mkdir(path string) error
	// lock locks the file at path, which it makes if necessary, or returns ErrLocked at
	// once. Closing the result unlocks it.
	lock(path string) (io.Closer, error)
	// lockWait is lock, but waits while another process has locked the file.
	lockWait(path string) (io.Closer, error)
	// isLocked reports whether a process has locked the file at path. A file that does not
	// exist is not locked.
	isLocked(path string) (bool, error)
	// names returns the names in a folder.
	names(path string) ([]string, error)
	// remove removes a file.
	remove(path string) error
	readFile(path string) ([]byte, error)
	// create opens the file at path for writing and truncates it.
	create(path string) (syncedFile, error)
	rename(from, to string) error
	// syncDir makes the entries of a folder durable.
	syncDir(path string) error
}

// syncedFile is a file whose data is durable after Sync.
type syncedFile interface {
	io.WriteCloser
	Sync() error
}

// osFS is the file system of this host.
type osFS struct{}

func (osFS) mkdir(path string) error { return os.Mkdir(path, 0o755) }

func (osFS) lock(path string) (io.Closer, error) {
	return openLocked(path, os.O_CREATE|os.O_RDWR, unix.LOCK_EX|unix.LOCK_NB)
}

func (osFS) lockWait(path string) (io.Closer, error) {
	return openLocked(path, os.O_CREATE|os.O_RDWR, unix.LOCK_EX)
}

func (osFS) isLocked(path string) (bool, error) {
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

func (osFS) names(path string) ([]string, error) {
	entries, err := os.ReadDir(path)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, err
}

func (osFS) remove(path string) error { return os.Remove(path) }

func (osFS) readFile(path string) ([]byte, error) { return os.ReadFile(path) }

func (osFS) create(path string) (syncedFile, error) {
	return os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
}

func (osFS) rename(from, to string) error { return os.Rename(from, to) }

func (osFS) syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
