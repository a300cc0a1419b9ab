package proc

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// connectTimeout bounds a connect to a unix socket, which waits while the queue of its
// listener is full.
const connectTimeout = 10 * time.Second

// SocketOwner connects to a unix socket and returns the process that listens on it.
func SocketOwner(ctx context.Context, path string) (pid int, err error) {
	conn, err := (&net.Dialer{Timeout: connectTimeout}).DialContext(ctx, "unix", path)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var cerr error
	err = raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(err, os.NewSyscallError("getsockopt SO_PEERCRED", cerr)); err != nil {
		return 0, err
	}
	return int(cred.Pid), nil
}

// LockHolder returns the process that has locked a file with flock(2), 0 if there is none
// or if it cannot be found.
func LockHolder(path string) (pid int) {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return 0
	}
	if path, err = filepath.Abs(path); err != nil {
		return 0
	}
	st, err := os.Stat(path)
	if err != nil {
		return 0
	}
	inode := strconv.FormatUint(st.Sys().(*syscall.Stat_t).Ino, 10)
	isFile := func(target string) bool { return target == path }
	locked := false
	for _, f := range procTable("/proc/locks") {
		// "1: FLOCK  ADVISORY  WRITE 123 08:01:456 0 EOF"; the device may be
		// another one than stat's, on stacked file systems.
		if len(f) < 6 || f[1] != "FLOCK" || !strings.HasSuffix(f[5], ":"+inode) {
			continue
		}
		locked = true
		if pid, err := strconv.Atoi(f[4]); err == nil && pid > 0 && holdsOpen(pid, isFile) {
			return pid
		}
	}
	if !locked {
		return 0
	}
	// The process that took the lock has passed the file to another one, and ended.
	for _, pid := range processes() {
		if holdsOpen(pid, isFile) {
			return pid
		}
	}
	return 0
}

// processes returns the processes of this host, none if they cannot be listed.
func processes() (pids []int) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	for _, entry := range entries {
		if pid, err := strconv.Atoi(entry.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// holdsOpen reports whether a process has a descriptor whose link in /proc
// matches.
func holdsOpen(pid int, matches func(target string) bool) bool {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	fds, err := os.ReadDir(dir)
	if err != nil {
		return false // it has ended, or is none of ours to look at
	}
	return slices.ContainsFunc(fds, func(fd os.DirEntry) bool {
		target, err := os.Readlink(filepath.Join(dir, fd.Name()))
		return err == nil && matches(target)
	})
}

// PortHolders returns the processes that listen on a TCP port, those that can be found.
func PortHolders(port int) (pids []int) {
	sockets := make(map[string]bool)
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		for _, f := range procTable(table) {
			const listening = "0A"
			if len(f) < 10 || f[3] != listening {
				continue
			}
			_, hex, _ := strings.Cut(f[1], ":")
			if p, err := strconv.ParseInt(hex, 16, 32); err == nil && int(p) == port {
				sockets["socket:["+f[9]+"]"] = true
			}
		}
	}
	if len(sockets) == 0 {
		return nil
	}
	for _, pid := range processes() {
		if holdsOpen(pid, func(target string) bool { return sockets[target] }) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// procTable returns the fields of the lines of a file in /proc, nil if it cannot
// be read.
func procTable(path string) (rows [][]string) {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	for scanner := bufio.NewScanner(f); scanner.Scan(); {
		rows = append(rows, strings.Fields(scanner.Text()))
	}
	return rows
}

// Name returns the name of a process (/proc/PID/comm), "?" if it cannot be read.
func Name(pid int) string {
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return "?"
	}
	return strings.TrimSpace(string(name))
}

// OpenFileLimit returns the hard limit of a process for open files: the Go runtime raises
// the soft limit to it. Process 0 is the calling one.
func OpenFileLimit(pid int) (uint64, error) {
	var limit unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &limit); err != nil {
		return 0, os.NewSyscallError("prlimit", err)
	}
	return limit.Max, nil
}
