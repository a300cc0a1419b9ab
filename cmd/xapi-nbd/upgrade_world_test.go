package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"xapi-nbd/cmd/xapi-nbd/internal/control"
	"xapi-nbd/xapi/xapitest"
)

// upgradeWorld is a world with a service that can be upgraded: its program is a file of its
// own, which can be replaced.
type upgradeWorld struct {
	*world
	p    *process // the first one; its output is that of all
	vdi  string
	data []byte

	mu    sync.Mutex
	codes map[int]unix.WaitStatus // of the processes that have ended, but the first one
}

// adoptOrphans makes this process the parent of the processes that services start, so that
// it gets their exit codes.
var adoptOrphans = sync.OnceValue(func() error { return unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) })

func newUpgradeWorld(t *testing.T, size int, more ...string) *upgradeWorld {
	t.Helper()
	if err := adoptOrphans(); err != nil {
		t.Fatal(err)
	}
	w := &upgradeWorld{world: newWorld(t, xapitest.Config{}), data: random(7, size), codes: make(map[int]unix.WaitStatus)}
	w.vdi = w.addVDI(w.data, xapitest.VDISpec{})
	w.program = filepath.Join(w.dir, "xapi-nbd")
	w.install(os.Args[0])
	w.p = w.start(more...)
	t.Cleanup(w.killAll)
	return w
}

// install replaces the program, as a package manager does: by a rename.
func (w *upgradeWorld) install(program string) {
	w.t.Helper()
	fresh := w.program + ".new"
	if err := os.Link(program, fresh); err != nil { // on another file system
		data, err := os.ReadFile(program)
		if err == nil {
			err = os.WriteFile(fresh, data, 0o755)
		}
		if err != nil {
			w.t.Fatal(err)
		}
	}
	if err := os.Rename(fresh, w.program); err != nil {
		w.t.Fatal(err)
	}
}

// installScript replaces the program by a shell script.
func (w *upgradeWorld) installScript(text string) {
	w.t.Helper()
	path := filepath.Join(w.dir, "script")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text), 0o755); err != nil {
		w.t.Fatal(err)
	}
	w.install(path)
	if err := os.Remove(path); err != nil {
		w.t.Fatal(err)
	}
}

// upgrade has the service upgrade, which must succeed.
func (w *upgradeWorld) upgrade() control.UpgradeReport {
	w.t.Helper()
	report, err := w.tryUpgrade()
	if err != nil || report.Error != "" {
		w.t.Fatalf("upgrade: %+v, %v\n%s", report, err, w.p.output())
	}
	return report
}

func (w *upgradeWorld) tryUpgrade() (report control.UpgradeReport, err error) {
	err = control.Ask(w.t.Context(), filepath.Join(w.dir, "state", control.SocketName), http.MethodPost, "/upgrade", &report)
	return report, err
}

// processes returns the processes of the service that have not ended, without those that
// only start another one.
func (w *upgradeWorld) processes() (pids []int) {
	w.t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		w.t.Fatal(err)
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		args, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline")) // empty for one that has ended
		if strings.Contains(string(args), "--state-dir="+filepath.Join(w.dir, "state")+"\x00") {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids
}

// wait waits for the end of a process that an upgrade has started.
func (w *upgradeWorld) wait(pid int) unix.WaitStatus {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	status, ended := w.codes[pid]
	for !ended {
		_, err := unix.Wait4(pid, &status, 0, nil)
		if err != nil && !errors.Is(err, unix.EINTR) {
			w.t.Fatalf("process %d: %v", pid, err)
		}
		ended = err == nil
	}
	w.codes[pid] = status
	return status
}

// killAll ends all processes of the service.
func (w *upgradeWorld) killAll() {
	for pids := w.processes(); len(pids) > 0; pids = w.processes() {
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGKILL)
			if pid != w.p.cmd.Process.Pid {
				_, _ = unix.Wait4(pid, nil, 0, nil)
			}
		}
	}
}

// waitProcesses waits until only these processes are left.
func (w *upgradeWorld) waitProcesses(want ...int) {
	w.t.Helper()
	eventually(w.t, func() string {
		got := w.processes()
		if slices.Equal(got, want) {
			return ""
		}
		return fmt.Sprintf("processes: got %v, want %v\n%s", got, want, w.p.output())
	})
}

// stopAll stops the main process, whose exit code must be 0, and waits for the end of all.
func (w *upgradeWorld) stopAll(main int) {
	w.t.Helper()
	if err := syscall.Kill(main, syscall.SIGTERM); err != nil {
		w.t.Fatal(err)
	}
	if main == w.p.cmd.Process.Pid {
		if code := w.p.exitCode(patience, "SIGTERM"); code != 0 {
			w.t.Errorf("exit code: got %d, want 0", code)
		}
	} else if status := w.wait(main); status.ExitStatus() != 0 {
		w.t.Errorf("exit status: got %#x, want 0", status)
	}
	w.waitProcesses()
	w.waitClean(nil)
	w.wantNoTraces()
}

// wantNoTraces requires of a stopped service that nothing is left of its generations.
func (w *upgradeWorld) wantNoTraces() {
	w.t.Helper()
	entries, err := os.ReadDir(filepath.Join(w.dir, "state"))
	if err != nil {
		w.t.Fatal(err)
	}
	for _, e := range entries {
		if name := e.Name(); strings.HasPrefix(name, "gen.") || strings.HasPrefix(name, control.SocketName) {
			w.t.Errorf("left in the state folder: %s", name)
		}
	}
}

// pullGate forwards connections to the service. Whenever the service has sent a further part of
// a number of bytes, on all connections together, the gate calls act before it forwards
// them, until it has called act a number of times. So the transfer cannot end before that.
type pullGate struct {
	t     *testing.T
	to    string
	every int64
	times int
	act   func()

	mu    sync.Mutex
	sent  int64
	calls int
}

// open makes the gate listen until the end of the test, and returns a process with its
// address.
func (g *pullGate) open() *process {
	g.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go g.forward(c)
		}
	}()
	return &process{t: g.t, addr: l.Addr().String()}
}

func (g *pullGate) forward(c net.Conn) {
	defer c.Close()
	server, err := net.Dial("tcp", g.to)
	if err != nil {
		g.t.Errorf("the service refuses a connection: %v", err)
		return
	}
	defer server.Close()
	go func() {
		_, _ = io.Copy(server, c)
		_ = server.(*net.TCPConn).CloseWrite()
	}()
	b := make([]byte, 64<<10)
	for {
		n, err := server.Read(b)
		if n > 0 {
			g.pass(int64(n))
			if _, err := c.Write(b[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

func (g *pullGate) pass(n int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.sent += n
	for g.calls < g.times && g.sent > int64(g.calls+1)*g.every {
		g.calls++
		g.act()
	}
}
