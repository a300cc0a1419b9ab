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

// findOpener looks at every descriptor of every process. Processes that end
// meanwhile or may not be looked at are passed over.
func findOpener(match func(pid, fd int, st *unix.Stat_t) bool) (int, error) {
	processes, err := os.ReadDir("/proc")
	if err != nil {
		return 0, err
	}
	for _, process := range processes {
		pid, err := strconv.Atoi(process.Name())
		if err != nil {
			continue
		}
		dir := "/proc/" + process.Name() + "/fd"
		fds, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for _, e := range fds {
			fd, err := strconv.Atoi(e.Name())
			if err != nil {
				continue
			}
			var st unix.Stat_t
			if unix.Stat(dir+"/"+e.Name(), &st) == nil && match(pid, fd, &st) {
				return pid, nil
			}
		}
	}
	return 0, nil
}
