package main

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// loopDevice is a read-only loop device that the kernel takes down by itself
// when nobody has it open any more: it does not outlive the program, however
// that ends.
type loopDevice struct {
	path string
	fd   int // keeps the device while no server has it open
}

// newLoop makes a file a block device. That takes root and a kernel whose loop
// devices the program may use; what is missing is in the error.
func newLoop(image string) (*loopDevice, error) {
	file, err := os.Open(image)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	control, err := unix.Open("/dev/loop-control", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening /dev/loop-control: %w", err)
	}
	defer unix.Close(control)
	config := &unix.LoopConfig{
		Fd:   uint32(file.Fd()),
		Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_READ_ONLY},
	}
	for range 100 { // somebody else may take the free device first
		n, err := unix.IoctlRetInt(control, unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("LOOP_CTL_GET_FREE: %w", err)
		}
		path := fmt.Sprintf("/dev/loop%d", n)
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("opening %s: %w", path, err)
		}
		if err = unix.IoctlLoopConfigure(fd, config); err == nil {
			return &loopDevice{path, fd}, nil
		}
		_ = unix.Close(fd)
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("configuring %s: %w", path, err)
		}
	}
	return nil, fmt.Errorf("no loop device was free for long enough: %w", unix.EBUSY)
}

// drop takes the device out of the page cache, so that every read of it has to wait
// for the device. What of the image is cached stays: the device is always as fast.
func (l *loopDevice) drop() error {
	return os.NewSyscallError("BLKFLSBUF", unix.IoctlSetInt(l.fd, unix.BLKFLSBUF, 0))
}

func (l *loopDevice) close() { _ = unix.Close(l.fd) }
