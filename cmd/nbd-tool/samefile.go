package main

import (
	"errors"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// fileID is a file or a device, by whatever name it was found.
type fileID struct{ device, inode uint64 }

// sameFile reports whether two paths lead to the same file or the same device, or
// one to a loop device and the other to what is behind that. A path that is empty
// or leads nowhere is nobody's.
func sameFile(a, b string) (bool, error) {
	if a == "" || b == "" {
		return false, nil
	}
	own, behind, err := storageOf(a)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	other, behindOther, err := storageOf(b)
	// Two devices on the same file may be different parts of it.
	return own == other || behind == other || own == behindOther, err
}

// storageOf is the file or device at the end of a path, and what is behind it if
// it is a loop device.
func storageOf(path string) (own, behind fileID, err error) {
	st, err := os.Stat(path)
	if err != nil {
		return own, behind, err
	}
	sys := st.Sys().(*syscall.Stat_t)
	if st.Mode().Type() != fs.ModeDevice {
		return fileID{sys.Dev, sys.Ino}, behind, nil
	}
	// Two nodes may stand for one device.
	return fileID{sys.Rdev, 0}, behindLoop(path), nil
}

// behindLoop is the file or device behind a loop device, empty if it is none, or
// has none. A device that cannot be opened will be an error soon enough.
func behindLoop(path string) fileID {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return fileID{}
	}
	defer unix.Close(fd)
	info, err := unix.IoctlLoopGetStatus64(fd)
	switch {
	case err != nil:
		return fileID{}
	case info.Rdevice != 0:
		return fileID{info.Rdevice, 0}
	}
	return fileID{info.Device, info.Inode}
}
