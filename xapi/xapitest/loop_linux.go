package xapitest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// loopChangeFD is LOOP_CHANGE_FD of linux/loop.h, which x/sys lacks.
const loopChangeFD = 0x4c06

// loopDevice is a loop device that the kernel removes when its last descriptor is closed
// (LO_FLAGS_AUTOCLEAR). The descriptor here keeps it until then, so a host that is killed
// leaves no device. LOOP_CLR_FD, which succeeds on a device that is open, is not needed.
type loopDevice struct {
	path, image string
	fd          int // -1 once released
	rdev        uint64
	readOnly    bool
}

// newLoop attaches image to a free loop device.
func newLoop(image string, readOnly bool, blockSize int) (*loopDevice, error) {
	flags, loopFlags := unix.O_RDWR, uint32(unix.LO_FLAGS_AUTOCLEAR)
	if readOnly {
		flags, loopFlags = unix.O_RDONLY, loopFlags|unix.LO_FLAGS_READ_ONLY
	}
	file, image, err := openImage(image, flags)
	if err != nil {
		return nil, err
	}
	defer unix.Close(file)
	config := &unix.LoopConfig{Fd: uint32(file), Size: uint32(blockSize), Info: unix.LoopInfo64{Flags: loopFlags}}
	copy(config.Info.File_name[:len(config.Info.File_name)-1], image)

	control, err := unix.Open("/dev/loop-control", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening /dev/loop-control: %w", err)
	}
	defer unix.Close(control)
	for range 100 { // another program may take the free device first
		n, err := unix.IoctlRetInt(control, unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("LOOP_CTL_GET_FREE: %w", err)
		}
		l, err := configureLoop(fmt.Sprintf("/dev/loop%d", n), image, config)
		if err == nil {
			l.readOnly = readOnly
		}
		if !errors.Is(err, unix.EBUSY) {
			return l, err
		}
	}
	return nil, fmt.Errorf("no loop device was free for long enough: %w", unix.EBUSY)
}

// openImage opens an image file. path is the file's without symlinks, as sysfs
// names it, see gone.
func openImage(image string, flags int) (fd int, path string, err error) {
	if fd, err = unix.Open(image, flags|unix.O_CLOEXEC, 0); err != nil {
		return -1, "", fmt.Errorf("opening %s: %w", image, err)
	}
	if path, err = os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd)); err != nil {
		_ = unix.Close(fd)
		return -1, "", err
	}
	return fd, path, nil
}

func configureLoop(path, image string, config *unix.LoopConfig) (*loopDevice, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", path, err)
	}
	var st unix.Stat_t
	err = unix.IoctlLoopConfigure(fd, config)
	if err == nil {
		err = unix.Fstat(fd, &st)
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("configuring %s: %w", path, err)
	}
	return &loopDevice{path: path, image: image, fd: fd, rdev: uint64(st.Rdev)}, nil
}

// accepts reports whether change will succeed: the kernel requires a read-only device and a
// file of the same size.
func (l *loopDevice) accepts(file int) error {
	var st unix.Stat_t
	if err := unix.Fstat(file, &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	size, err := unix.Seek(l.fd, 0, io.SeekEnd)
	switch {
	case err != nil:
		return os.NewSyscallError("lseek", err)
	case !l.readOnly:
		return fmt.Errorf("%s is not read-only", l.path)
	case st.Size != size:
		return fmt.Errorf("the image has %d bytes, %s has %d", st.Size, l.path, size)
	}
	return nil
}

// change replaces the data of the device, for all its descriptors, by that of another file.
// Pages of the old data that are mapped or in use stay cached.
func (l *loopDevice) change(file int, image string) error {
	if err := unix.IoctlSetInt(l.fd, loopChangeFD, file); err != nil {
		return os.NewSyscallError("LOOP_CHANGE_FD", err)
	}
	l.image = image
	return os.NewSyscallError("BLKFLSBUF", unix.IoctlSetInt(l.fd, unix.BLKFLSBUF, 0))
}

// resize makes the device as large as its file is now.
func (l *loopDevice) resize() error {
	return os.NewSyscallError("LOOP_SET_CAPACITY", unix.IoctlSetInt(l.fd, unix.LOOP_SET_CAPACITY, 0))
}

// release closes the descriptor that keeps the device. Other descriptors or a read in
// progress may keep it longer, see gone.
func (l *loopDevice) release() {
	if l.fd >= 0 {
		_ = unix.Close(l.fd)
		l.fd = -1
	}
}

// gone reports whether the kernel has removed the device, or has given its number to
// another file. It reads sysfs, because opening the device would keep it.
func (l *loopDevice) gone() bool {
	b, err := os.ReadFile("/sys/block/" + strings.TrimPrefix(l.path, "/dev/") + "/loop/backing_file")
	file := strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), " (deleted)")
	return err != nil || file != l.image
}
