package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// daemonEnv tells a process that it is to be a daemon. Its value is the descriptor of a pipe to
// its parent, which receives a byte when the daemon serves clients.
const daemonEnv = "NBD_TOOL_DAEMON"

func isDaemon() bool { return os.Getenv(daemonEnv) != "" }

// exitStatus is an error that has been reported, with the exit code of the process that has
// reported it.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// startDaemon starts this program again, in a session of its own, and returns when that
// process serves clients or has failed. The end of ctx ends that process.
func startDaemon(ctx context.Context) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	ready, child, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	cmd := exec.Command(self, os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{child}
	cmd.Env = append(os.Environ(), daemonEnv+"=3") // the first descriptor of ExtraFiles
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = inheritNone()
	if err == nil {
		err = cmd.Start()
	}
	child.Close()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Signal(syscall.SIGTERM) })
	defer stop()
	if _, err := io.ReadFull(ready, make([]byte, 1)); err == nil {
		return cmd.Process.Release()
	}
	var exit *exec.ExitError
	switch err := cmd.Wait(); {
	case !errors.As(err, &exit):
		return errors.Join(errors.New("the daemon has ended before it served clients"), err)
	case !exit.Exited():
		return fmt.Errorf("the daemon has ended before it served clients: %w", err)
	}
	return exitStatus(exit.ExitCode())
}

// inheritNone keeps the descriptors that this process has inherited, other than the standard
// streams, from those that it starts: a daemon would hold the locks and pipes of its caller.
func inheritNone() error {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			return err
		}
		if fd > int(os.Stderr.Fd()) {
			unix.CloseOnExec(fd)
		}
	}
	return nil
}

// daemonReady tells the parent that clients are served, and gives up the standard streams: the
// terminal, and pipes whose readers would wait for this process. Standard error stays if it is
// a file. In a process that is no daemon it does nothing.
func daemonReady() error {
	if !isDaemon() {
		return nil
	}
	fd, err := strconv.Atoi(os.Getenv(daemonEnv))
	if err != nil {
		return fmt.Errorf("%s: %w", daemonEnv, err)
	}
	parent := os.NewFile(uintptr(fd), "parent")
	defer parent.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	for _, f := range []*os.File{os.Stdin, os.Stdout, os.Stderr} {
		if st, err := f.Stat(); f == os.Stderr && err == nil && st.Mode().IsRegular() {
			continue
		}
		if err := unix.Dup3(int(null.Fd()), int(f.Fd()), 0); err != nil {
			return os.NewSyscallError("dup3", err)
		}
	}
	_, err = parent.Write([]byte{1})
	return err
}
