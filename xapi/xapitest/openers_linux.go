package xapitest

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// openerOfBlock finds a process with a descriptor of the block device rdev,
// other than the descriptor own of this process. 0 means none.
func openerOfBlock(rdev uint64, own int) (pid int, err error) {
	return findOpener(func(pid, fd int, st *unix.Stat_t) bool {
		if st.Mode&unix.S_IFMT != unix.S_IFBLK || uint64(st.Rdev) != rdev {
			return false
		}
		return pid != os.Getpid() || fd != own
	})
}

// openerOfFile finds a process with a descriptor of the file. 0 means none,
// also if the file does not exist any more.
func openerOfFile(path string) (pid int, err error) {
	var file unix.Stat_t
	if err := unix.Stat(path, &file); err != nil {
		return 0, nil
	}
	return findOpener(func(_, _ int, st *unix.Stat_t) bool {
		return st.Dev == file.Dev && st.Ino == file.Ino
	})
}

// findOpener examines every descriptor of every process. It skips processes that end meanwhile
// or that it may not examine.
func findOpener(match func(pid, fd int, st *unix.Stat_t) bool) (int, error) {
	proc, err := unix.Open("/proc", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, os.NewSyscallError("open /proc", err)
	}
	defer unix.Close(proc)
	var st unix.Stat_t
	// Since Linux 6.2 the size of a folder of descriptors is their number, and most
	// processes are kernel threads without any.
	sized := unix.Fstatat(proc, "self/fd", &st, 0) == nil && st.Size > 0
	found := 0
	err = eachNumber(proc, func(pid int) bool {
		name := strconv.Itoa(pid) + "/fd"
		if sized && (unix.Fstatat(proc, name, &st, 0) != nil || st.Size == 0) {
			return true
		}
		dir, err := unix.Openat(proc, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return true
		}
		defer unix.Close(dir)
		_ = eachNumber(dir, func(fd int) bool {
			if unix.Fstatat(dir, strconv.Itoa(fd), &st, 0) == nil && match(pid, fd, &st) {
				found = pid
			}
			return found == 0
		})
		return found == 0
	})
	return found, err
}

// eachNumber calls f for each entry of the open directory whose name is a number, until f
// returns false. os.ReadDir would sort them, and each unplug reads hundreds.
func eachNumber(dir int, f func(n int) bool) error {
	var buf [4096]byte
	for {
		n, err := unix.ReadDirent(dir, buf[:])
		if err != nil || n == 0 {
			return os.NewSyscallError("getdents64", err)
		}
		_, _, names := unix.ParseDirent(buf[:n], -1, nil)
		for _, name := range names {
			if number, err := strconv.Atoi(name); err == nil && !f(number) {
				return nil
			}
		}
	}
}
