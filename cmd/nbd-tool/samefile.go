package main

import (
	"errors"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// fileID identifies a file or a device independently of its path.
type fileID struct{ device, inode uint64 }

// sameFile reports whether two paths lead to the same file or device, or one to a loop
// device and the other to the file or device behind it. A path that is empty or does not
// exist is not the same as any other.
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

// storageOf returns the file or device of a path, and the one behind it if it is a loop
// device.
func storageOf(path string) (own, behind fileID, err error) {
	st, err := os.Stat(path)
	if err != nil {
		return own, behind, err
	}
	sys := st.Sys().(*syscall.Stat_t)
	if st.Mode().Type() != fs.ModeDevice {
		return fileID{sys.Dev, sys.Ino}, behind, nil
	}
	// One device may have two nodes.
	return fileID{sys.Rdev, 0}, behindLoop(path), nil
}

// behindLoop returns the file or device behind a loop device, or zero if path is no loop
// device or has nothing behind it. It ignores a device that cannot be opened: the copy
// itself will fail.
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
