package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Where the kernel lets a user trace only descendants of the tracer (Yama), the service
// must allow strace, which is its sibling here. Elsewhere the call fails and is not needed.
func init() {
	if os.Getenv(childEnv) != "" {
		_ = unix.Prctl(unix.PR_SET_PTRACER, ^uintptr(0), 0, 0, 0) // PR_SET_PTRACER_ANY
	}
}

// tracer is strace, attached to a process and all its threads.
type tracer struct {
	cmd   *exec.Cmd
	lines chan string // its output; closed at its end
}

// lifetimeLines is more lines than strace prints from start to stop of a service: a recording
// test reads them only at the end.
const lifetimeLines = 4096

// attach returns when strace traces every operation of the process on these files of the
// world, by name or by descriptor. inject is the argument of strace's --inject, or "". The
// process must not be in one of these operations.
func (w *crashWorld) attach(p *process, inject string, files ...string) (*tracer, error) {
	args := []string{
		"-f", "-y", "-p", strconv.Itoa(p.cmd.Process.Pid), "-e", "trace=%file,%desc",
		"-e", "signal=STOP", "-e", "quiet=path-resolution,exit",
	}
	for _, file := range files {
		args = append(args, "-P", w.name(file))
	}
	if inject != "" {
		args = append(args, "-e", "inject="+inject)
	}
	tr := &tracer{cmd: exec.Command(w.strace, args...), lines: make(chan string, lifetimeLines)}
	out, err := tr.cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := tr.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(tr.lines)
		for scanner := bufio.NewScanner(out); scanner.Scan(); {
			tr.lines <- scanner.Text()
		}
		_ = tr.cmd.Wait() // it was interrupted, or its process killed
	}()
	var said []string
	for line := range tr.lines {
		if strings.HasSuffix(line, " attached") || strings.Contains(line, " attached with ") {
			return tr, nil
		}
		said = append(said, line)
	}
	return nil, fmt.Errorf("strace does not trace: %q", said)
}

// waitStop waits until an injected SIGSTOP has stopped a process, right behind the
// operation it was injected into, and returns one of its threads, 0 if only one is traced.
// ok is false if the tracing has ended.
func (tr *tracer) waitStop() (thread int, ok bool) {
	stopped, ok := tr.waitStopped()
	thread, _ = strconv.Atoi(strings.Trim(strings.TrimPrefix(stopped, "[pid"), " ]"))
	return thread, ok
}

// waitStopped returns the beginning of the lines of the thread with the signal.
func (tr *tracer) waitStopped() (thread string, ok bool) {
	for line := range tr.lines {
		if before, _, ok := strings.Cut(line, "--- SIGSTOP {"); ok {
			thread = before
		}
		// Each thread has such a line. That of the one with the signal shows that
		// the stop has begun.
		if thread != "" && line == thread+"--- stopped by SIGSTOP ---" {
			return thread, true
		}
	}
	return "", false
}

// detach ends the tracing; the process goes on, or stays stopped.
func (tr *tracer) detach() {
	_ = tr.cmd.Process.Signal(syscall.SIGINT)
	tr.drain()
}

// drain waits for strace's end.
func (tr *tracer) drain() {
	for range tr.lines {
	}
}
