package blockdev

import (
	"errors"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// storage has the system calls for the content of a device; tests replace it. They may
// transfer fewer bytes than they were asked for, and return plain errors of the kernel.
type storage interface {
	pread(p []byte, off int64) (int, error)
	// pwrite writes. With durable it returns when the bytes are on stable storage.
	pwrite(p []byte, off int64, durable bool) (int, error)
	// sync flushes the device's write cache.
	sync() error
	// discard frees the storage of a range of whole blocks. The content is not defined
	// afterwards.
	discard(off, n int64) error
	// zero zeroes a range of whole blocks, which stays allocated. It returns an error that
	// unsupported accepts, and has changed nothing, if there is no such call.
	zero(off, n int64) error
}

// kernel is the storage of an open file or block device.
type kernel struct{ f *os.File }

func (k kernel) fd() int { return int(k.f.Fd()) }

func (k kernel) pread(p []byte, off int64) (int, error) { return unix.Pread(k.fd(), p, off) }

func (k kernel) pwrite(p []byte, off int64, durable bool) (int, error) {
	if !durable {
		return unix.Pwrite(k.fd(), p, off)
	}
	return unix.Pwritev2(k.fd(), [][]byte{p}, off, unix.RWF_DSYNC)
}

func (k kernel) sync() error { return unix.Fsync(k.fd()) }

func (k kernel) discard(off, n int64) error {
	var st unix.Stat_t
	if err := unix.Fstat(k.fd(), &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		return unix.Fallocate(k.fd(), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	}
	span := [2]uint64{uint64(off), uint64(n)}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, k.f.Fd(), unix.BLKDISCARD, uintptr(unsafe.Pointer(&span)))
	if errno != 0 {
		return errno
	}
	return nil
}

// zero is BLKZEROOUT for a block device.
func (k kernel) zero(off, n int64) error {
	return unix.Fallocate(k.fd(), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

// unsupported reports whether an error means that the kernel, the file system or the driver
// does not have a call, and so has changed nothing.
func unsupported(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.ENODEV)
}
