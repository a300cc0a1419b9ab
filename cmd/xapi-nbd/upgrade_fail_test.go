package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"xapi-nbd/cmd/xapi-nbd/internal/control"
	"xapi-nbd/nbd/client"
	"xapi-nbd/test/requires"
)

// wantNotUpgraded requires that an upgrade fails with that error, and that the service goes
// on as if nothing had happened: the connection, new clients, its process, its descriptors.
func (w *upgradeWorld) wantNotUpgraded(conn *client.Conn, want string) {
	w.t.Helper()
	pid := w.p.cmd.Process.Pid
	before := w.descriptors(pid)
	report, err := w.tryUpgrade()
	if err != nil || report.PID != 0 || !strings.Contains(report.Error, want) {
		w.t.Errorf("got %+v, %v, want an error with %q", report, err, want)
	}
	w.waitProcesses(pid)
	if _, err := conn.ReadAt(make([]byte, 512), 0); err != nil {
		w.t.Errorf("the connection: %v", err)
	}
	w.readsAsNewClient(w.p, w.vdi)
	if r := w.report(); r.PID != pid || r.Generation != 1 || r.State != control.StateServing {
		w.t.Errorf("status: got process %d, generation %d, %q", r.PID, r.Generation, r.State)
	}
	w.wantNoMoreDescriptors(pid, before)
}

// New programs that do not work: the old process goes on, and upgrades when there is one
// that does.
func TestUpgradeToABrokenProgram(t *testing.T) {
	w := newUpgradeWorld(t, 64<<10)
	conn := w.mustOpen(w.p, w.vdi)
	if _, err := conn.ReadAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, script, want string }{
		{"ends with 0", "exit 0", "the new process has ended"},
		{"fails", "exit 3", "the new process has ended"},
		{"is killed", "kill -9 $$", "the new process has ended"},
		{"prints garbage", "head -c 100000 /dev/urandom; head -c 1000 /dev/urandom >&2", "the new process has ended"},
		{"sends garbage", "echo garbage >/proc/self/fd/6; exec sleep 100", "message of the new process"},
		{"says that it is ready and ends", `echo '{"ready":true}' >/proc/self/fd/6`, "the new process has ended"},
		{"says that it fails", `echo '{"error":"on purpose"}' >/proc/self/fd/6`, "on purpose"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w.installScript(tt.script + "\n")
			w.wantNotUpgraded(conn, tt.want)
		})
	}
	w.install(os.Args[0])
	last := w.upgrade()
	w.stopAll(last.PID)
}

// Settings with which the new process cannot serve.
func TestUpgradeWithBrokenSettings(t *testing.T) {
	dir := t.TempDir()
	config := filepath.Join(dir, "xapi-nbd.toml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("")
	w := newUpgradeWorld(t, 64<<10, "--config="+config)
	conn := w.mustOpen(w.p, w.vdi)
	if _, err := conn.ReadAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	write("speed = 1\n")
	w.wantNotUpgraded(conn, `unknown key "speed"`)
	write("max_vbds = 0\n")
	w.wantNotUpgraded(conn, "max_vbds must be at least 1")
	write("")

	cert, err := os.ReadFile(w.trust.Server)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(w.trust.Server, []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	w.wantNotUpgraded(conn, "certfile")
	if err := os.WriteFile(w.trust.Server, cert, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(w.program); err != nil {
		t.Fatal(err)
	}
	w.wantNotUpgraded(conn, "no such file")
	w.install(os.Args[0])
	if code, _, errOut := w.status("--drain"); code != 0 {
		t.Errorf("--drain: exit code %d, %s", code, errOut)
	}
	if r, err := w.tryUpgrade(); err != nil || r.Error != "the service is draining" {
		t.Errorf("while draining: got %+v, %v", r, err)
	}
	if code, _, errOut := w.status("--undrain"); code != 0 {
		t.Errorf("--undrain: exit code %d, %s", code, errOut)
	}
	last := w.upgrade()
	w.stopAll(last.PID)
}

// A new process that hangs is killed after 30 seconds, and the command says so with an exit
// code of its own.
func TestUpgradeToAProgramThatHangs(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 30 seconds")
	}
	w := newUpgradeWorld(t, 64<<10)
	conn := w.mustOpen(w.p, w.vdi)
	if _, err := conn.ReadAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	w.installScript("while :; do sleep 1; done\n")
	w.wantNotUpgraded(conn, "the new process was not ready in time")
	w.stopAll(w.p.cmd.Process.Pid)
}

// Without space in the state folder there is no upgrade, and with space again there is.
func TestUpgradeWithoutSpace(t *testing.T) {
	requires.Root(t)
	w := newUpgradeWorld(t, 64<<10)
	w.stopAll(w.p.cmd.Process.Pid)
	state := filepath.Join(w.dir, "state")
	if err := unix.Mount("tmpfs", state, "tmpfs", 0, "size=1m,nr_inodes=40"); err != nil {
		t.Skipf("no file system of its own: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(state, 0); err != nil {
			t.Error(err)
		}
	})
	w.p = w.start()
	t.Cleanup(w.killAll)
	conn := w.mustOpen(w.p, w.vdi)
	if _, err := conn.ReadAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	// Exactly the files that the new process needs are missing, one after the other.
	var filler []string
	for {
		path := filepath.Join(state, fmt.Sprintf("filler%d", len(filler)))
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			break
		}
		filler = append(filler, path)
	}
	for missing := range 2 {
		report, err := w.tryUpgrade()
		if err != nil || !strings.Contains(report.Error, "no space left") {
			t.Errorf("%d free files: got %+v, %v, want no space", missing, report, err)
		}
		if _, err := conn.ReadAt(make([]byte, 512), 0); err != nil {
			t.Errorf("the connection: %v", err)
		}
		if r := w.report(); r.PID != w.p.cmd.Process.Pid || r.State != control.StateServing {
			t.Errorf("status: got process %d, %q", r.PID, r.State)
		}
		if err := os.Remove(filler[missing]); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range filler[2:] {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	last := w.upgrade()
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	w.stopAll(last.PID)
}
