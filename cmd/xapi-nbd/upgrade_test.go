package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"xapi-nbd/cmd/xapi-nbd/internal/control"
	"xapi-nbd/cmd/xapi-nbd/internal/proc"
	"xapi-nbd/test/requires"
)

// Twenty upgrades during one pull: the client has one connection all the time, and gets
// every byte.
func TestUpgradesDuringAPull(t *testing.T) {
	for _, secure := range []bool{false, true} {
		t.Run(map[bool]string{false: "clear", true: "TLS"}[secure], func(t *testing.T) {
			const upgrades, part = 20, 64 << 10
			w := newUpgradeWorld(t, upgrades*part)
			conn, err := w.open(w.p, w.export(w.vdi), secure)
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(w.data))
			var last control.UpgradeReport
			for i := range upgrades {
				if _, err := conn.ReadAt(got[i*part:(i+1)*part], int64(i*part)); err != nil {
					t.Fatalf("after %d upgrades: %v", i, err)
				}
				last = w.upgrade()
			}
			if !bytes.Equal(got, w.data) {
				t.Error("the copy differs")
			}
			// Those between have ended: they had no connection.
			w.waitProcesses(sorted(w.p.cmd.Process.Pid, last.PID)...)
			if err := conn.Close(); err != nil {
				t.Error(err)
			}
			w.waitProcesses(last.PID)
			w.waitClean(nil)
			w.stopAll(last.PID)
			if code := w.p.exitCode(patience, "its last connection"); code != 0 {
				t.Errorf("the first process: exit code %d, want 0", code)
			}
		})
	}
}

func sorted(pids ...int) []int { slices.Sort(pids); return pids }

// Twenty upgrades during one pull by each tool that people use.
func TestUpgradesDuringPullsByTools(t *testing.T) {
	for _, name := range []string{"nbdcopy", "qemu-img"} {
		requires.Tool(t, name)
	}
	nbdTool := filepath.Join(t.TempDir(), "nbd-tool")
	tool(t, "go", "build", "-o", nbdTool, "xapi-nbd/cmd/nbd-tool")
	for _, secure := range []bool{false, true} {
		for name, pull := range map[string]func(w *upgradeWorld, t *testing.T, p *process, out string){
			"nbdcopy": func(w *upgradeWorld, t *testing.T, p *process, out string) {
				tool(t, "nbdcopy", w.uri(p, w.export(w.vdi), secure), out)
			},
			"nbd-tool": func(w *upgradeWorld, t *testing.T, p *process, out string) {
				tool(t, nbdTool, "copy", w.uri(p, w.export(w.vdi), secure), out)
			},
			"qemu-img": func(w *upgradeWorld, t *testing.T, p *process, out string) {
				w.qemuImg(t, p, w.export(w.vdi), secure, out)
			},
		} {
			t.Run(fmt.Sprintf("%s, TLS %v", name, secure), func(t *testing.T) {
				const upgrades, part = 20, 256 << 10
				w := newUpgradeWorld(t, (upgrades+1)*part)
				var last control.UpgradeReport
				g := &pullGate{t: t, to: w.p.addr, every: part, times: upgrades, act: func() { last = w.upgrade() }}
				out := filepath.Join(t.TempDir(), "copy")
				pull(w, t, g.open(), out) // which fails unless the exit code is 0
				wantFile(t, out, w.data)
				if g.calls != upgrades {
					t.Errorf("upgrades during the pull: got %d, want %d", g.calls, upgrades)
				}
				w.waitProcesses(last.PID)
				w.stopAll(last.PID)
			})
		}
	}
}

// A thousand clients come while one upgrade follows the other, and none is refused.
func TestUpgradesRefuseNobody(t *testing.T) {
	const clients, workers = 1000, 4
	w := newUpgradeWorld(t, 64<<10, "--log-level=info")
	name := w.export(w.vdi)
	var left atomic.Int32
	left.Store(clients)
	var working sync.WaitGroup
	for n := range workers {
		working.Go(func() {
			b := make([]byte, len(w.data))
			for left.Add(-1) >= 0 {
				conn, err := w.open(w.p, name, n%2 == 0)
				if err != nil {
					t.Errorf("a client was refused: %v", err)
					left.Store(0)
					return
				}
				if _, err := conn.ReadAt(b, 0); err != nil || !bytes.Equal(b, w.data) {
					t.Errorf("reading: %v, or wrong data", err)
				}
				if err := conn.Close(); err != nil {
					t.Errorf("closing: %v", err)
				}
			}
		})
	}
	upgrades := 0
	var last control.UpgradeReport
	for left.Load() > 0 {
		report, err := w.tryUpgrade()
		if strings.Contains(report.Error, "still serve connections") {
			continue // too many: the next attempt
		}
		if err != nil || report.Error != "" {
			t.Errorf("upgrade: %+v, %v", report, err)
			break
		}
		last = report
		upgrades++
	}
	working.Wait()
	t.Logf("%d upgrades", upgrades)
	w.waitProcesses(last.PID)
	w.waitClean(nil)
	w.stopAll(last.PID)
}

// Twenty generations in a row leave one process with one lock and no further descriptor.
func TestUpgradesInARow(t *testing.T) {
	w := newUpgradeWorld(t, 64<<10)
	first, pid := w.descriptors(w.p.cmd.Process.Pid), 0
	for range 20 {
		before := pid
		pid = w.upgrade().PID
		w.waitProcesses(pid)
		if before == 0 {
			continue
		}
		if status := w.wait(before); status.ExitStatus() != 0 {
			t.Errorf("a process that was replaced: exit status %#x, want 0", status)
		}
	}
	r := w.report()
	if r.PID != pid || r.Generation != 21 || len(r.Replaced) > 0 || r.State != control.StateServing {
		t.Errorf("got %+v, want process %d of generation 21 alone", r, pid)
	}
	files, err := filepath.Glob(filepath.Join(w.dir, "state", "gen.*"))
	if err != nil || len(files) != 1 {
		t.Errorf("locks: got %q, %v, want one", files, err)
	}
	w.wantNoMoreDescriptors(pid, first)
	w.stopAll(pid)
}

// wantNoMoreDescriptors requires that a process comes to have no descriptor beside those.
func (w *upgradeWorld) wantNoMoreDescriptors(pid int, than []string) {
	w.t.Helper()
	eventually(w.t, func() string {
		more := w.descriptors(pid)
		for _, d := range than {
			if i := slices.Index(more, d); i >= 0 {
				more = slices.Delete(more, i, i+1)
			}
		}
		if len(more) == 0 {
			return ""
		}
		return fmt.Sprintf("process %d has more descriptors: %q", pid, more)
	})
}

// descriptors returns the open files of a process, without numbers.
func (w *upgradeWorld) descriptors(pid int) (all []string) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil {
			continue // closed meanwhile
		}
		target, _, _ = strings.Cut(target, ":[")
		if strings.Contains(target, "/state/gen.") {
			target = "generation"
		}
		all = append(all, target)
	}
	slices.Sort(all)
	return all
}

// status shows both processes, --disconnect and --drain reach both, cleanup leaves both
// alone.
func TestUpgradeIsInTheStatus(t *testing.T) {
	w := newUpgradeWorld(t, 64<<10)
	old := w.mustOpen(w.p, w.vdi)
	read := func(what string, c interface {
		ReadAt([]byte, int64) (int, error)
	}) {
		t.Helper()
		if _, err := c.ReadAt(make([]byte, 512), 0); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	read("before", old)
	report := w.upgrade()
	if report.Waiting != 1 {
		t.Errorf("connections that the old process serves: got %d, want 1", report.Waiting)
	}
	fresh := w.mustOpen(w.p, w.vdi)
	read("of the new process", fresh)
	r := w.report()
	if r.PID != report.PID || r.Generation != 2 || len(r.Replaced) != 1 || len(r.Journal) != 1 || len(r.Leftovers) != 0 {
		t.Fatalf("status: got %+v", r)
	}
	o := r.Replaced[0]
	if o.PID != w.p.cmd.Process.Pid || o.Generation != 1 || o.State != control.StateReplaced || len(o.Attachments) != 1 || len(o.Journal) != 1 {
		t.Errorf("status of the old process: got %+v", o)
	}
	if _, out, _ := w.status(); !strings.Contains(out, fmt.Sprintf("\nprocess %d, version %s, replaced by an upgrade\n", o.PID, o.Version)) {
		t.Errorf("the screen does not show the old process:\n%s", out)
	}
	if code, out, errOut := w.cleanup(); code != 0 || !strings.Contains(out, "Nothing was left behind.") {
		t.Errorf("cleanup: got %d, %q, %q", code, out, errOut)
	}
	read("after cleanup, old", old)
	read("after cleanup, new", fresh)

	if code, _, _ := w.status("--disconnect=2/" + o.Connections[0].ID[2:]); code != 1 {
		t.Errorf("--disconnect of another generation: exit code %d, want 1", code)
	}
	if code, out, errOut := w.status("--drain"); code != 0 || !strings.Contains(out, "may finish: 2") {
		t.Errorf("--drain: got %d, %q, %q", code, out, errOut)
	}
	if err := fresh.Close(); err != nil {
		t.Error(err)
	}
	read("the new process has drained", old)
	if code, out, errOut := w.status("--disconnect=" + o.Connections[0].ID); code != 0 {
		t.Errorf("--disconnect: got %d, %q, %q", code, out, errOut)
	}
	if _, err := old.ReadAt(make([]byte, 512), 0); err == nil {
		t.Error("the old process still serves a connection that was closed")
	}
	if status := w.wait(report.PID); status.ExitStatus() != 0 { // drained, after both have ended
		t.Errorf("exit status: got %#x, want 0", status)
	}
	w.waitProcesses()
	w.waitClean(nil)
	w.wantNoTraces()
}

// A stop of the new process stops the old ones, too, and so does --disconnect with a VDI
// reach all of them.
func TestStopAfterUpgrades(t *testing.T) {
	w := newUpgradeWorld(t, 64<<10)
	var last control.UpgradeReport
	for range 3 {
		conn := w.mustOpen(w.p, w.vdi)
		if _, err := conn.ReadAt(make([]byte, 512), 0); err != nil {
			t.Fatal(err)
		}
		last = w.upgrade()
	}
	if n := len(w.processes()); n != 4 {
		t.Errorf("processes: got %d, want 4", n)
	}
	if code, out, errOut := w.status("--disconnect=" + w.vdi); code != 0 || !strings.Contains(out, "were closed: 3") {
		t.Errorf("--disconnect: got %d, %q, %q", code, out, errOut)
	}
	w.waitProcesses(last.PID)
	conn := w.mustOpen(w.p, w.vdi)
	if _, err := conn.ReadAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	last = w.upgrade()
	w.stopAll(last.PID)
	if _, err := conn.ReadAt(make([]byte, 512), 0); err == nil {
		t.Error("a connection of the old process outlives the stop")
	}
}

// After drain_timeout the old process ends although it serves somebody.
func TestUpgradeEndsAfterDrainTimeout(t *testing.T) {
	dir := t.TempDir()
	config := filepath.Join(dir, "xapi-nbd.toml")
	if err := os.WriteFile(config, []byte("drain_timeout = \"50ms\"\nstop_timeout = \"2s\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	w := newUpgradeWorld(t, 64<<10, "--config="+config)
	conn := w.mustOpen(w.p, w.vdi)
	if _, err := conn.ReadAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	last := w.upgrade()
	w.waitProcesses(last.PID)
	w.p.waitLine("drain_timeout is over")
	w.waitClean(nil)
	w.stopAll(last.PID)
}

// SIGUSR2 upgrades, the command says what it did, and unix sockets and metrics go over to
// the new process.
func TestUpgradeBySignal(t *testing.T) {
	dir := t.TempDir()
	config := filepath.Join(dir, "xapi-nbd.toml")
	w := newUpgradeWorld(t, 64<<10)
	w.stopAll(w.p.cmd.Process.Pid)
	listen, metrics := filepath.Join(w.dir, "nbd"), filepath.Join(w.dir, "metrics")
	if err := os.WriteFile(config, []byte(fmt.Sprintf("metrics = \"unix:%s\"\n", metrics)), 0o600); err != nil {
		t.Fatal(err)
	}
	// Without a certificate there is none that an upgrade could lose.
	w.p = w.start("--config="+config, "--listen=unix:"+listen, "--certfile="+filepath.Join(w.dir, "none"))
	if err := w.p.cmd.Process.Signal(syscall.SIGUSR2); err != nil {
		t.Fatal(err)
	}
	w.p.waitLine("upgraded: new clients are served by this process")
	eventually(t, func() string {
		if pids := w.processes(); len(pids) != 1 || pids[0] == w.p.cmd.Process.Pid {
			return fmt.Sprintf("processes: got %v, want a new one", pids)
		}
		return ""
	})
	var out, errOut bytes.Buffer
	code := run(context.Background(), []string{"upgrade", "--state-dir=" + filepath.Join(w.dir, "state")}, &out, &errOut)
	r := w.report()
	want := fmt.Sprintf("Process %d, version %s, serves new clients. Connections that the old process still serves: 0.\n", r.PID, r.Version)
	if code != 0 || out.String() != want {
		t.Errorf("got exit code %d, %q, %q, want %q", code, out.String(), errOut.String(), want)
	}
	w.waitProcesses(r.PID)
	// check asks the system for them.
	if pid := proc.LockHolder(filepath.Join(w.dir, "state", "lock")); pid != r.PID {
		t.Errorf("the lock belongs to process %d, want %d", pid, r.PID)
	}
	if pid, err := proc.SocketOwner(t.Context(), listen); err != nil || pid != r.PID {
		t.Errorf("the unix socket belongs to process %d, %v, want %d", pid, err, r.PID)
	}
	for _, path := range []string{listen, metrics} {
		eventually(t, func() string {
			c, err := net.Dial("unix", path)
			if err != nil {
				return fmt.Sprintf("%s: %v", path, err)
			}
			c.Close()
			return ""
		})
	}
	w.stopAll(r.PID)
	if _, err := os.Stat(listen); !os.IsNotExist(err) {
		t.Errorf("the unix socket is left behind: %v", err)
	}
}
