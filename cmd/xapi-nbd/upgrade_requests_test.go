package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"xapi-nbd/cmd/xapi-nbd/internal/control"
)

// beginUpgrade begins an upgrade and returns when the new process has read its settings and
// waits for xapi. finish lets it go on, and waits for the end of the upgrade.
func (w *upgradeWorld) beginUpgrade() (finish func()) {
	w.t.Helper()
	const opened = "certificate loaded"
	before := strings.Count(w.p.output(), opened)
	release := w.host.Block("session.login_with_password")
	w.t.Cleanup(release)
	upgraded := make(chan control.UpgradeReport, 1)
	go func() {
		report, err := w.tryUpgrade()
		if err != nil {
			w.t.Error(err)
		}
		upgraded <- report
	}()
	eventually(w.t, func() string {
		if strings.Count(w.p.output(), opened) > before {
			return ""
		}
		return "the new process has not opened its certificate\n" + w.p.output()
	})
	return func() {
		w.t.Helper()
		release()
		if report := <-upgraded; report.Error != "" {
			w.t.Errorf("upgrade: %s", report.Error)
		}
	}
}

// TestReloadDuringUpgrade: the process that is in charge afterwards carries it out.
func TestReloadDuringUpgrade(t *testing.T) {
	config := filepath.Join(t.TempDir(), "xapi-nbd.toml")
	write := func(maxVBDs int) {
		t.Helper()
		if err := os.WriteFile(config, fmt.Appendf(nil, "max_vbds = %d\n", maxVBDs), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(5)
	w := newUpgradeWorld(t, 64<<10, "--config="+config)
	conn := w.mustOpen(w.p, w.vdi) // keeps the old process
	finish := w.beginUpgrade()
	reload := func(maxVBDs int) {
		t.Helper()
		write(maxVBDs)
		if err := w.p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
	}
	wantLimit := func(maxVBDs int) {
		t.Helper()
		eventually(t, func() string {
			if got := w.report().Limits.MaxVBDs; got != maxVBDs {
				return fmt.Sprintf("max_vbds: got %d, want %d\n%s", got, maxVBDs, w.p.output())
			}
			return ""
		})
	}
	reload(6)
	finish()
	wantLimit(6)
	reload(7) // of the old process, by somebody who does not know of the upgrade
	wantLimit(7)
	conn.Close()
	w.stopAll(w.report().PID)
}

// TestDrainDuringUpgrade: a process that is about to be replaced says so instead of agreeing
// to drain, and the next request reaches the new process.
func TestDrainDuringUpgrade(t *testing.T) {
	w := newUpgradeWorld(t, 64<<10)
	finish := w.beginUpgrade()
	type result struct {
		code        int
		out, errOut string
	}
	drained := make(chan result, 1)
	go func() {
		code, out, errOut := w.status("--drain")
		drained <- result{code, out, errOut}
	}()
	w.p.waitLine("asked to drain")
	finish()
	if r := <-drained; r.code != 1 || !strings.Contains(r.errOut, "an upgrade has just replaced this process: ask again") {
		t.Errorf("--drain: got exit code %d, %q, %q", r.code, r.out, r.errOut)
	}
	r := w.report()
	if r.State != control.StateServing {
		t.Errorf("the new process: got state %q, want it to serve", r.State)
	}
	w.readsAsNewClient(w.p, w.vdi)
	if code, out, errOut := w.status("--drain"); code != 0 || !strings.Contains(out, "may finish: ") {
		t.Errorf("--drain once more: got exit code %d, %q, %q", code, out, errOut)
	}
	if status := w.wait(r.PID); status.ExitStatus() != 0 {
		t.Errorf("exit status: got %#x, want 0", status)
	}
	w.waitProcesses()
	w.wantNoTraces()
}
