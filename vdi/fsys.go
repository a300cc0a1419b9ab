package vdi

import (
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// fsys is what the journal asks of a file system. It is an interface so that
// tests can cut the power at every operation and keep only what was synced.
type fsys interface {
	// mkdir makes one folder; one that exists already is fs.ErrExist.
	mkdir(path string) error
	// lock takes the lock file at path, which it makes if necessary, or says
	// ErrLocked at once. Closing gives it back.
	lock(path string) (io.Closer, error)
	readFile(path string) ([]byte, error)
	// create opens an empty file at path for writing, whatever was there.
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

// osFS is the real one.
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
