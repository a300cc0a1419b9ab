package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cpuTime is the processor time, user and system, that all threads of a process
// have used, those that have ended included. It is the sum of utime and
// stime of /proc/PID/stat, by the process's clock: that one has nanoseconds
// where the file has hundredths of a second.
func cpuTime(pid int) (time.Duration, error) {
	const wholeProcess = 2 // CPUCLOCK_SCHED, of all threads; see clock_getcpuclockid(3)
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid)<<3|wholeProcess, &ts); err != nil {
		return 0, os.NewSyscallError("clock_gettime", err)
	}
	return time.Duration(ts.Nano()), nil
}

// resetPeak makes the present memory of a process its highest so far. Without
// the right to do so the highest stays that of its whole life.
func resetPeak(pid int) {
	_ = os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0)
}

// memory is the memory of a process, now and at its highest, in bytes. Pipes
// and socket buffers are the kernel's and not in it.
func memory(pid int) (now, peak int64, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0, err
	}
	fields := procFields(string(text))
	return fields["VmRSS"], fields["VmHWM"], nil
}

// procFields reads "Name: 123 kB" lines as bytes; other lines are left out.
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

// freeMemory is what the kernel thinks it could give without swapping.
func freeMemory() int64 {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	return procFields(string(text))["MemAvailable"]
}

// allowFiles lifts a process's limit of open files as far as it goes: some
// servers need several for each connection.
func allowFiles(pid int) {
	var limit unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &limit); err != nil {
		return
	}
	limit.Cur = limit.Max
	_ = unix.Prlimit(pid, unix.RLIMIT_NOFILE, &limit, nil)
}
