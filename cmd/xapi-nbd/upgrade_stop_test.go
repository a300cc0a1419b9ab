package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"xapi-nbd/cmd/xapi-nbd/internal/servicetest"
	"xapi-nbd/test/requires"
)

// wantAllEnded requires that no process of the service is left, and nothing of it on the
// host, nor in the state folder after the next start. The exit code of the first process must be 0.
func (w *upgradeWorld) wantAllEnded() {
	w.t.Helper()
	w.waitProcesses()
	if code := w.p.exitCode(patience, "SIGTERM"); code != 0 {
		w.t.Errorf("exit code of the first process: got %d, want 0", code)
	}
	w.waitClean(nil)
	// A process that was killed leaves its socket and its lock.
	w.p = w.start()
	w.stopAll(w.p.cmd.Process.Pid)
}

// terminate sends SIGTERM to the first process.
func (w *upgradeWorld) terminate() {
	_ = w.p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
}

// TestStopBeforeSystemdFollows: systemd sends SIGTERM to the old process, as it has not
// processed yet that the new one is the main process. Both end.
func TestStopBeforeSystemdFollows(t *testing.T) {
	for _, transfer := range []bool{false, true} {
		t.Run(fmt.Sprintf("transfer %v", transfer), func(t *testing.T) {
			w := newUpgradeWorld(t, 64<<10)
			w.stopAll(w.p.cmd.Process.Pid)
			systemd := servicetest.NewSystemd(t, w.dir)
			w.p = w.start()
			t.Cleanup(w.killAll) // before the end of its output is waited for
			if transfer {
				conn := w.mustOpen(w.p, w.vdi)
				if _, err := conn.ReadAt(make([]byte, 512), 0); err != nil {
					t.Fatal(err)
				}
			}
			upgraded := make(chan error, 1)
			go func() {
				_, err := w.tryUpgrade()
				upgraded <- err
			}()
			systemd.Wait(`^MAINPID=`)
			w.terminate()
			w.p.waitLine("msg=stopping")
			systemd.Wait(`^BARRIER=1$`)
			<-upgraded // with an answer or without
			w.wantAllEnded()
		})
	}
}

// TestStopWhileTheNewProcessStarts: a new process that is not ready is killed.
func TestStopWhileTheNewProcessStarts(t *testing.T) {
	w := newUpgradeWorld(t, 64<<10)
	release := w.host.Block("session.login_with_password")
	defer release()
	upgraded := make(chan error, 1)
	go func() {
		_, err := w.tryUpgrade()
		upgraded <- err
	}()
	eventually(t, func() string {
		if n := len(w.processes()); n != 2 {
			return fmt.Sprintf("%d processes", n)
		}
		return ""
	})
	w.terminate()
	w.p.waitLine("msg=stopping")
	release()
	<-upgraded
	w.wantAllEnded()
}

// TestStopCountsVBDsOfReplacedProcesses: a stop reports those that a replaced process leaves.
func TestStopCountsVBDsOfReplacedProcesses(t *testing.T) {
	config := filepath.Join(t.TempDir(), "stop.toml")
	if err := os.WriteFile(config, []byte("stop_timeout = \"1s\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	w := newUpgradeWorld(t, 64<<10, "--config="+config)
	conn := w.mustOpen(w.p, w.vdi)
	if _, err := conn.ReadAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	last := w.upgrade()
	w.host.FailAlways("VBD.unplug", "DEVICE_DETACH_REJECTED")
	if err := syscall.Kill(last.PID, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if status := w.wait(last.PID); status.ExitStatus() != exitLeft {
		t.Errorf("exit status: got %#x, want %d", status, exitLeft)
	}
	w.waitProcesses()
	w.host.ClearFaults()
	w.p = w.start()
	w.waitClean(w.p)
}

// TestUpgradeStopped sends SIGTERM to the old process right behind each operation by which
// two processes hand over. Whatever the point, all processes end, and nothing is left.
func TestUpgradeStopped(t *testing.T) {
	setServiceEnv(t)
	requires.Tool(t, "strace")
	points := recordUpgrade(t)
	var tests []func()
	var reached atomic.Int32
	for _, at := range points {
		tests = append(tests, func() {
			t.Run(strings.TrimPrefix(at.String(), "before "), func(t *testing.T) {
				if stopDuringUpgrade(t, at) {
					reached.Add(1)
				}
			})
		})
	}
	runAbreast(tests)
	t.Logf("%d points, %d were reached", len(points), reached.Load())
	if int(reached.Load()) < len(points)/2 {
		t.Error("too few points were reached")
	}
}

// stopDuringUpgrade stops the service at a point of an upgrade. It returns false if this
// upgrade took fewer operations.
func stopDuringUpgrade(t *testing.T, at point) bool {
	w := newUpgradeWorld(t, 64<<10)
	conn := w.mustOpen(w.p, w.vdi)
	if _, err := conn.ReadAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	reached := w.duringUpgrade(at, w.terminate)
	_, _ = w.tryUpgrade() // with an answer or without
	if !reached.Load() {
		w.killAll()
		return false
	}
	w.wantAllEnded()
	return true
}
