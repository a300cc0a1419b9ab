package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cpuTime returns the user and system time of all threads of a process, ended ones
// included. The process's clock has nanoseconds, /proc/PID/stat only hundredths of a second.
func cpuTime(pid int) (time.Duration, error) {
	const wholeProcess = 2 // CPUCLOCK_SCHED, of all threads; see clock_getcpuclockid(3)
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid)<<3|wholeProcess, &ts); err != nil {
		return 0, os.NewSyscallError("clock_gettime", err)
	}
	return time.Duration(ts.Nano()), nil
}

// resetPeak resets the peak memory of a process to the present one. Without the permission
// the peak stays that since the start of the process.
func resetPeak(pid int) {
	_ = os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0)
}

// memory returns the resident memory of a process and its peak in bytes. Pipes and socket
// buffers are the kernel's and not included.
func memory(pid int) (now, peak int64, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0, err
	}
	fields := procFields(string(text))
	return fields["VmRSS"], fields["VmHWM"], nil
}

// procFields parses lines of the form "Name: 123 kB" into bytes and ignores others.
func procFields(text string) map[string]int64 {
	fields := map[string]int64{}
	for line := range strings.Lines(text) {
		name, rest, _ := strings.Cut(line, ":")
		f := strings.Fields(rest)
		if len(f) != 2 || f[1] != "kB" {
			continue
		}
		if n, err := strconv.ParseInt(f[0], 10, 64); err == nil {
			fields[name] = n << 10
		}
	}
	return fields
}

// freeMemory returns the kernel's estimate of the bytes available without swapping.
func freeMemory() int64 {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	return procFields(string(text))["MemAvailable"]
}

// allowFiles raises the limit of open files of a process to its hard limit: some servers
// need several for each connection.
func allowFiles(pid int) {
	var limit unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &limit); err != nil {
		return
	}
	limit.Cur = limit.Max
	_ = unix.Prlimit(pid, unix.RLIMIT_NOFILE, &limit, nil)
}
