package guest

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// upgrade replaces the program while a transfer runs: systemd follows the new process, the
// transfer goes on in the old one, also after a crash of the new one, and a stop ends all.
func (u *unit) upgrade(t *testing.T) {
	conn := u.open(t, &service{addr: local}, u.vdi)
	defer conn.Close()
	reads := func(when string) {
		t.Helper()
		got := make([]byte, len(u.data))
		if _, err := conn.ReadAt(got, 0); err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		wantSame(t, when, got, u.data)
	}
	reads("before")
	old := u.property(t, "MainPID")
	for range 3 {
		must(t, "install", "xapi-nbd", "/usr/sbin/xapi-nbd.new")
		must(t, "mv", "/usr/sbin/xapi-nbd.new", "/usr/sbin/xapi-nbd")
		t.Log(must(t, "xapi-nbd", "upgrade"))
		u.waitProperty(t, "MainPID", "is that of the new process", func(pid string) bool { return pid != old && pid != "0" })
		u.waitStatus(t, "serving")
		reads("after an upgrade")
	}
	if state, restarts := u.property(t, "ActiveState"), u.property(t, "NRestarts"); state != "active" || restarts != "0" {
		t.Errorf("got state %q and %s restarts, want an active unit without", state, restarts)
	}
	u.waitProcesses(t, 2)
	t.Log(must(t, "xapi-nbd", "status"))
	t.Log(must(t, "systemctl", "status", "--no-pager", "-n", "0", "xapi-nbd"))

	u.endBy(t, "KILL")
	reads("after a crash of the new process")
	u.waitStatus(t, "serving")
	reads("beside the process that systemd has started")
	if !slices.Contains(u.processes(t), old) {
		t.Error("the old process has ended with the new one")
	}
	main := u.property(t, "MainPID")
	u.systemctl(t, "stop", "xapi-nbd")
	u.waitProcesses(t, 0)
	if _, err := conn.ReadAt(make([]byte, 512), 0); err == nil {
		t.Errorf("the stop of process %s has not ended process %s", main, old)
	}
	u.systemctl(t, "start", "xapi-nbd")
	u.pulls(t, local)
}

// endReplaced: a stop after a crash of the main process does not reach a process that it has
// replaced. status shows that one, and --end-replaced ends it.
func (u *unit) endReplaced(t *testing.T) {
	u.configure(t, "", "Restart=no\n")
	conn := u.open(t, &service{addr: local}, u.vdi)
	defer conn.Close()
	old := u.property(t, "MainPID")
	t.Log(must(t, "xapi-nbd", "upgrade"))
	u.waitProperty(t, "MainPID", "is that of the new process", func(pid string) bool { return pid != old && pid != "0" })
	u.systemctl(t, "kill", "--kill-who=main", "-s", "KILL", "xapi-nbd")
	u.waitProperty(t, "ActiveState", "is that of a crash", func(state string) bool { return state == "failed" })
	u.systemctl(t, "stop", "xapi-nbd")
	if _, err := conn.ReadAt(make([]byte, 512), 0); err != nil {
		t.Errorf("after the crash and the stop: %v", err)
	}
	out, err := exec.Command("xapi-nbd", "status").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "process "+old+",") {
		t.Errorf("status: got %v, want an error\n%s", err, out)
	}
	t.Log(must(t, "xapi-nbd", "status", "--end-replaced"))
	if err := unix.Access("/proc/"+old, unix.F_OK); err == nil {
		t.Errorf("process %s has not ended", old)
	}
	if _, err := conn.ReadAt(make([]byte, 512), 0); err == nil {
		t.Error("the connection of the process that was ended is served")
	}
}

// upgradePackage installs a package, and then a newer build of it while a transfer runs: the
// scripts of the package let the service upgrade itself.
func (u *unit) upgradePackage(t *testing.T, install func(pattern string) (output string), first, second string) {
	t.Log(install(first))
	u.configure(t, "", "")
	u.systemctl(t, "restart", "xapi-nbd")
	u.pulls(t, local)
	conn := u.open(t, &service{addr: local}, u.vdi)
	defer conn.Close()
	old := u.property(t, "MainPID")
	half := len(u.data) / 2
	got := make([]byte, len(u.data))
	if _, err := conn.ReadAt(got[:half], 0); err != nil {
		t.Fatal(err)
	}
	t.Log(install(second))
	u.waitProperty(t, "MainPID", "is that of the new process", func(pid string) bool { return pid != old && pid != "0" })
	u.waitStatus(t, "serving")
	u.waitProcesses(t, 2)
	t.Log(must(t, "systemctl", "status", "--no-pager", "-n", "0", "xapi-nbd"))
	if _, err := conn.ReadAt(got[half:], int64(half)); err != nil {
		t.Fatalf("after the upgrade: %v", err)
	}
	wantSame(t, "the transfer", got, u.data)
	if restarts := u.property(t, "NRestarts"); restarts != "0" {
		t.Errorf("restarts: got %s, want 0", restarts)
	}
	conn.Close()
	u.waitProcesses(t, 1)
	u.pulls(t, local)
}

// upgradeDeb does so with dpkg, for which the same version again is an upgrade too.
func (u *unit) upgradeDeb(t *testing.T) {
	u.upgradePackage(t, func(pattern string) string {
		return must(t, "dpkg", "--force-confold", "-i", onlyFile(t, pattern))
	}, "*.deb", "*.deb")
}

// upgradeRPM does so with rpm. The system is Debian, so nothing that the package depends on
// is in rpm's database.
func (u *unit) upgradeRPM(t *testing.T) {
	must(t, "dpkg", "--remove", "xapi-nbd")
	u.upgradePackage(t, func(pattern string) string {
		return must(t, "rpm", "-U", "-v", "--nodeps", onlyFile(t, pattern))
	}, "first/*.rpm", "second/*.rpm")
}

// onlyFile returns the only file with such a name.
func onlyFile(t *testing.T, pattern string) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("packages", pattern))
	if err != nil || len(files) != 1 {
		t.Fatalf("packages/%s: got %v, %v, want one file", pattern, files, err)
	}
	return files[0]
}

// processes returns the processes of the unit.
func (u *unit) processes(t *testing.T) []string {
	t.Helper()
	group := u.property(t, "ControlGroup")
	if group == "" {
		return nil
	}
	// Where systemd has its hierarchy depends on what else is mounted.
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd"} {
		data, err := os.ReadFile(filepath.Join(root, group, "cgroup.procs"))
		if err == nil {
			return strings.Fields(string(data))
		}
		if !os.IsNotExist(err) && !errors.Is(err, unix.ENODEV) {
			t.Fatal(err)
		}
	}
	return nil
}

func (u *unit) waitProcesses(t *testing.T, want int) {
	t.Helper()
	u.waitProperty(t, "ControlGroup", "has the right number of processes", func(string) bool { return len(u.processes(t)) == want })
}
