package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// congestionFile says how TCP connections of this network namespace avoid
// congestion.
const congestionFile = "/proc/sys/net/ipv4/tcp_congestion_control"

// congestion is the name of what new connections use.
func congestion() string {
	name, err := os.ReadFile(congestionFile)
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(name))
}

// insideVariable tells the program that it is in a network of its own.
const insideVariable = "NBD_BENCH_NETWORK"

// withCongestion runs the program again, in a network namespace of its own where
// connections use another congestion control. What is set for the machine stays.
// It wants root.
func withCongestion(ctx context.Context, name string, args []string, std streams) error {
	if os.Getenv(insideVariable) != "" {
		if err := upLoopback(); err != nil {
			return err
		}
		return os.WriteFile(congestionFile, []byte(name), 0)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, self, args...)
	cmd.Env = append(os.Environ(), insideVariable+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = std.in, std.out, std.err
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("in a network of its own with %s: %w", name, err)
	}
	return nil
}

// upLoopback switches the loopback device on, which is off in a new network.
func upLoopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCSIFFLAGS, uintptr(unsafe.Pointer(request))); errno != 0 {
		return os.NewSyscallError("ioctl SIOCSIFFLAGS", errno)
	}
	return nil
}
