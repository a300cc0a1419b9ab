package copying

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// StateLock keeps other processes from using the file of a state.
type StateLock struct{ f *os.File }

// LockFile returns the path of the file that is locked in place of that of a state, which is
// another one after each [State.Save].
func LockFile(path string) string { return path + ".lock" }

// LockState locks the file of a state, which need not exist. If another process has locked it
// the error says so. The lock ends with [StateLock.Unlock], or with the process.
func LockState(path string) (*StateLock, error) {
	for {
		f, err := os.OpenFile(LockFile(path), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, err
		}
		ours, err := lock(f)
		if ours {
			return &StateLock{f}, nil
		}
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s: another process is copying with this file", path)
		}
		if err != nil {
			return nil, fmt.Errorf("locking %s: %w", f.Name(), err)
		}
	}
}

// lock locks a file. ours is false, without an error, if the file was removed by
// [StateLock.Unlock] meanwhile.
func lock(f *os.File) (ours bool, err error) {
	for err = unix.EINTR; errors.Is(err, unix.EINTR); {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if err != nil {
		return false, err
	}
	locked, err := f.Stat()
	if err != nil {
		return false, err
	}
	there, err := os.Stat(f.Name())
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return err == nil && os.SameFile(locked, there), err
}

// Unlock ends the lock and removes its file.
func (l *StateLock) Unlock() {
	_ = os.Remove(l.f.Name()) // a file that is left does no harm
	l.f.Close()
}
