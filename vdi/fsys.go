package vdi

import (
	"errors"
	"io"
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
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, ErrLocked
		}
		return nil, os.NewSyscallError("flock", err)
	}
	return f, nil
}

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
