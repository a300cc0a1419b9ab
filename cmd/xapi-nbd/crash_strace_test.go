package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Where the kernel lets a user trace only what descends from the tracer (Yama),
// the service must allow strace, which is its sibling here. Elsewhere the call
// fails and is not needed.
func init() {
	if os.Getenv(childEnv) != "" {
		_ = unix.Prctl(unix.PR_SET_PTRACER, ^uintptr(0), 0, 0, 0) // PR_SET_PTRACER_ANY
	}
}

// tracer is strace, attached to a process and all its threads.
type tracer struct {
	cmd   *exec.Cmd
	lines chan string // what it prints; closed at its end
}

// lifetimeLines is more than strace prints in a whole life: whoever records one
// listens only at its end.
const lifetimeLines = 4096

// attach returns when strace watches every operation of the process on these
// files of the world, by name or by descriptor. inject is strace's: what to do
// at some of them, or "". The process must not be at any of them.
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

// waitStop waits until an injected SIGSTOP has stopped the process, right behind
// the operation it was injected into; false means that the tracing has ended.
func (tr *tracer) waitStop() bool {
	thread := ""
	for line := range tr.lines {
		if before, _, ok := strings.Cut(line, "--- SIGSTOP {"); ok {
			thread = before
		}
		// Each thread has such a line. That of the one with the signal shows that
		// the stop has begun.
		if thread != "" && line == thread+"--- stopped by SIGSTOP ---" {
			return true
		}
	}
	return false
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

// ops waits for the end of the process and returns what it did, in order.
func (tr *tracer) ops(w *crashWorld) (ops []point) {
	seen := make(map[point]int)
	for line := range tr.lines {
		if op, ok := w.parseOp(line); ok {
			seen[op]++
			op.n = seen[op]
			ops = append(ops, op)
		}
	}
	return ops
}

// opLine is an operation as strace prints it: on an open file, or on a name.
var opLine = regexp.MustCompile(`^(?:\[pid +\d+\] )?(\w+)\((?:\d+<([^>]*)>|(?:AT_FDCWD<[^>]*>, )?"([^"]*)")`)

// ofPoller are operations by which Go's poller gets to know a file. They change
// nothing that outlives the process.
var ofPoller = map[string]bool{"fcntl": true, "epoll_ctl": true}

// parseOp makes a point, without its number, of a line. The second half of an
// operation that strace prints in two is not counted again.
func (w *crashWorld) parseOp(line string) (op point, ok bool) {
	m := opLine.FindStringSubmatch(line)
	if m == nil || ofPoller[m[1]] {
		return point{}, false
	}
	name := m[2] + m[3]
	if name == w.name(imageFile) {
		return point{what: m[1], file: imageFile}, true
	}
	rel, err := filepath.Rel(w.dir, name)
	if err != nil || !filepath.IsLocal(rel) {
		w.t.Errorf("not a file of this world: %s", line)
	}
	return point{what: m[1], file: rel}, true
}

// imageFile stands for the file behind the VDI, whose name is random.
const imageFile = "image"

// name is what a file of a point is called in this world.
func (w *crashWorld) name(file string) string {
	if file == imageFile {
		return w.host.ImagePath(w.vdi)
	}
	return filepath.Join(w.dir, file)
}

// atOp has act called with the process stopped right behind an operation; the
// process goes on afterwards.
func (w *crashWorld) atOp(p *process, op point, act func()) {
	w.t.Helper()
	tr := w.mustAttach(p, op, "STOP")
	w.inBackground(tr, func() {
		for n := 1; tr.waitStop(); n++ {
			if n == op.n {
				tr.detach()
				act()
			}
			goOn(p)
		}
	})
}

// killBeforeOp has the kernel kill the process instead of executing an
// operation. strace counts operations by thread, and Go moves from one to
// another, so that only the first of them all can be named: those before it are
// passed with another tracer.
func (w *crashWorld) killBeforeOp(p *process, op point) {
	w.t.Helper()
	if op.n == 1 {
		w.inBackground(w.mustAttach(p, op, "KILL"), func() {})
		return
	}
	last := op
	last.n--
	w.atOp(p, last, func() {
		if tr, err := w.attach(p, op.what+":signal=KILL", op.file); err != nil {
			w.t.Error(err)
		} else {
			go tr.drain() // until the process is dead
		}
	})
}

func (w *crashWorld) mustAttach(p *process, op point, signal string) *tracer {
	w.t.Helper()
	tr, err := w.attach(p, op.what+":signal="+signal, op.file)
	if err != nil {
		w.t.Fatal(err)
	}
	return tr
}

// inBackground runs f and then waits for the end of the tracer, which the end
// of the test enforces.
func (w *crashWorld) inBackground(tr *tracer, f func()) {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		f()
		tr.drain()
	}()
	w.t.Cleanup(func() {
		_ = tr.cmd.Process.Kill()
		<-ended
	})
}

// goOn lets a stopped process go on. It may be dead.
func goOn(p *process) { _ = p.cmd.Process.Signal(syscall.SIGCONT) }
