package guest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xapi-nbd/nbd/client"
	"xapi-nbd/xapi/xapitest"
)

// TestSystemd tests the service as the packages install it, under a systemd that is process 1:
// after each temporary failure the service starts again.
func TestSystemd(t *testing.T) {
	t.Setenv("TMPDIR", "/srv") // the unit has a /tmp of its own
	w := newWorld(t, xapitest.StyleSM, nil)
	u := &unit{world: w, data: diskContent(1, 512)}
	u.vdi = w.addVDI(u.data, 512)
	u.install(t)
	u.configure(t, "", "")
	u.systemctl(t, "start", "xapi-nbd")
	u.pulls(t, local)
	for _, tt := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"crash", u.crash},
		{"crash after crash", u.crashAfterCrash},
		{"hang", u.hang},
		{"address that appears later", u.addressLater},
		{"clean-up beside the start", u.cleanupBeside},
		{"full disk of the state folder", u.fullState},
		{"full disk of the log", u.fullLog},
		{"log that nobody takes", u.stuckLog},
		{"upgrade", u.upgrade},
		{"end of replaced processes", u.endReplaced},
		{"wrong settings", u.wrongSettings},
		{"upgrade by dpkg", u.upgradeDeb},
		{"upgrade by rpm", u.upgradeRPM},
	} {
		t.Run(tt.name, func(t *testing.T) {
			defer func() {
				if t.Failed() {
					out, _ := exec.Command("journalctl", "-u", "xapi-nbd", "-n", "40", "--no-pager").CombinedOutput()
					t.Logf("the end of the journal:\n%s", out)
				}
			}()
			u.configure(t, "", "")
			u.systemctl(t, "restart", "xapi-nbd")
			u.pulls(t, local)
			tt.run(t)
		})
	}
	journal := must(t, "journalctl", "-u", "xapi-nbd", "--no-pager")
	for _, ref := range w.refs {
		if strings.Contains(journal, strings.TrimPrefix(ref, "OpaqueRef:")) {
			t.Error("the journal contains a session ref")
		}
	}
}

const (
	local     = "127.0.0.1:10809"
	stateDir  = "/var/lib/xapi-nbd"
	unitsDir  = "/usr/lib/systemd/system"
	dropInDir = "/etc/systemd/system/xapi-nbd.service.d"
)

// unit is the installed service.
type unit struct {
	*world
	vdi  string
	data []byte
}

// install puts program and units where the packages put them.
func (u *unit) install(t *testing.T) {
	t.Helper()
	for from, to := range map[string]string{
		"xapi-nbd": "/usr/sbin/xapi-nbd", "xapi-nbd.service": unitsDir + "/xapi-nbd.service",
		"hardening.conf": unitsDir + "/xapi-nbd.service.d/hardening.conf",
	} {
		must(t, "install", "-D", from, to)
	}
}

// configure writes settings besides those of the simulated host, and a drop-in.
func (u *unit) configure(t *testing.T, settings, dropIn string) {
	t.Helper()
	settings += fmt.Sprintf("xapi_socket = %q\ninventory = %q\ndevice_dir = %q\n", u.absolute(u.host.Socket()), u.absolute(u.host.Inventory()), u.absolute(u.host.DeviceDir()))
	for path, text := range map[string]string{"/etc/xapi-nbd.toml": settings, dropInDir + "/test.conf": "[Service]\n" + dropIn} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	u.systemctl(t, "daemon-reload")
}

func (u *unit) absolute(path string) string {
	abs, err := filepath.Abs(path)
	if err != nil {
		u.t.Fatal(err)
	}
	return abs
}

func (u *unit) systemctl(t *testing.T, args ...string) {
	t.Helper()
	must(t, "systemctl", args...)
}

// property returns a property of the service from systemd.
func (u *unit) property(t *testing.T, name string) string {
	t.Helper()
	return strings.TrimSpace(must(t, "systemctl", "show", "-P", name, "xapi-nbd"))
}

// waitProperty waits until a property of the service satisfies a condition.
func (u *unit) waitProperty(t *testing.T, name, what string, fine func(string) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	last := ""
	err := waitFor(ctx, name+" that "+what, func() (bool, error) {
		last = u.property(t, name)
		return fine(last), nil
	})
	if err != nil {
		t.Fatalf("%v; it is %q", err, last)
	}
}

func (u *unit) waitStatus(t *testing.T, text string) {
	t.Helper()
	u.waitProperty(t, "StatusText", "contains "+text, func(got string) bool { return strings.Contains(got, text) })
}

// tryPull reads the disk once.
func (u *unit) tryPull(t *testing.T, addr string) error {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	client, err := client.Dial(ctx, "tcp", addr, nil)
	if err != nil {
		return err
	}
	conn, err := client.Go(ctx, u.host.ExportName(u.vdi, u.session()))
	if err != nil {
		_ = client.Abort()
		return err
	}
	defer conn.Close()
	got := make([]byte, len(u.data))
	if _, err := conn.ReadAt(got, 0); err != nil {
		return err
	}
	wantSame(t, "pulled", got, u.data)
	return nil
}

// pulls waits until the disk can be read, and until nothing is left of it then.
func (u *unit) pulls(t *testing.T, addr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var last error
	if err := waitFor(ctx, "a disk that can be pulled", func() (bool, error) {
		last = u.tryPull(t, addr)
		return last == nil, nil
	}); err != nil {
		t.Fatalf("%v: %v", err, last)
	}
	if err := u.host.Wait(ctx, func(vbds []xapitest.VBD) bool { return len(vbds) == 0 }); err != nil {
		t.Fatalf("VBDs left: %+v", u.host.VBDs())
	}
}

// endBy sends a signal and waits for another process.
func (u *unit) endBy(t *testing.T, signal string) {
	t.Helper()
	before := u.property(t, "MainPID")
	u.systemctl(t, "kill", "--kill-who=main", "-s", signal, "xapi-nbd")
	u.waitProperty(t, "MainPID", "is another one", func(pid string) bool { return pid != before && pid != "0" })
}

// crash: by the signals of a fault, of the watchdog and of kill -9, in the middle of
// a transfer.
func (u *unit) crash(t *testing.T) {
	for _, signal := range []string{"SEGV", "ABRT", "KILL", "QUIT"} {
		conn := u.open(t, &service{addr: local}, u.vdi)
		u.endBy(t, signal)
		conn.Close()
		u.pulls(t, local)
	}
	if cores, _ := filepath.Glob("/core*"); len(cores) > 0 {
		t.Errorf("cores: %q", cores)
	}
}

// crashAfterCrash: systemd starts the service again after many crashes.
func (u *unit) crashAfterCrash(t *testing.T) {
	for range 8 {
		u.endBy(t, "SEGV")
	}
	u.pulls(t, local)
}

// hang: a process that does nothing any more is ended by the watchdog.
func (u *unit) hang(t *testing.T) {
	u.configure(t, "", "WatchdogSec=2\nTimeoutStopSec=2\n")
	u.systemctl(t, "restart", "xapi-nbd")
	u.endBy(t, "STOP")
	u.pulls(t, local)
	if journal := must(t, "journalctl", "-u", "xapi-nbd", "--no-pager"); !strings.Contains(journal, "Watchdog timeout") {
		t.Error("it was not the watchdog")
	}
}

// addressLater: at boot an address may be missing, and the network as a whole.
func (u *unit) addressLater(t *testing.T) {
	const later = "192.0.2.10:10809"
	u.configure(t, `listen = ["`+later+`", "`+local+`"]`+"\n", "")
	must(t, "ip", "link", "set", "lo", "down")
	u.systemctl(t, "restart", "xapi-nbd")
	u.waitStatus(t, "cannot listen "+later)
	if state := u.property(t, "ActiveState"); state != "active" {
		t.Errorf("the service is %s", state)
	}
	must(t, "ip", "link", "set", "lo", "up")
	u.pulls(t, local)
	must(t, "ip", "address", "add", "192.0.2.10/32", "dev", "lo")
	u.pulls(t, later)
	must(t, "ip", "address", "del", "192.0.2.10/32", "dev", "lo")
}

// cleanupBeside: a clean-up has the state folder when the service starts; another
// clean-up waits for both.
func (u *unit) cleanupBeside(t *testing.T) {
	u.systemctl(t, "stop", "xapi-nbd")
	tag := map[string]string{"xapi-nbd": u.host.InstallationUUID() + " nonce"}
	if _, err := u.host.AddForeignVBD(u.vdi, tag); err != nil {
		t.Fatal(err)
	}
	release := u.host.Block("VBD.destroy")
	defer release()
	first := exec.Command("xapi-nbd", "cleanup")
	if err := first.Start(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := waitFor(ctx, "the first clean-up", func() (bool, error) { return isLocked(stateDir + "/lock"), nil }); err != nil {
		t.Fatal(err)
	}
	u.systemctl(t, "start", "xapi-nbd")
	u.waitStatus(t, "waiting for the state folder")
	second := exec.Command("xapi-nbd", "cleanup")
	if err := second.Start(); err != nil {
		t.Fatal(err)
	}
	release()
	for i, cleanup := range []*exec.Cmd{first, second} {
		if err := cleanup.Wait(); err != nil {
			t.Errorf("clean-up %d: %v", i+1, err)
		}
	}
	u.pulls(t, local)
}

// isLocked reports whether a process holds the lock of a file.
func isLocked(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	return unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) != nil
}

// fullState: with a full disk nothing is plugged, because it could not be recorded, and the
// service goes on.
func (u *unit) fullState(t *testing.T) {
	u.systemctl(t, "stop", "xapi-nbd")
	fill := fullDisk(t, stateDir)
	u.systemctl(t, "start", "xapi-nbd")
	u.waitStatus(t, "serving")
	if err := u.tryPull(t, local); err == nil {
		t.Error("a disk is served whose VBD cannot be recorded")
	}
	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	u.pulls(t, local)
	u.systemctl(t, "stop", "xapi-nbd")
}

// fullLog: lines that cannot be written are counted, and nothing waits for them.
func (u *unit) fullLog(t *testing.T) {
	dir := "/srv/log"
	fill := fullDisk(t, dir)
	u.configure(t, "", "StandardError=append:"+dir+"/log\nReadWritePaths="+dir+"\n")
	u.systemctl(t, "restart", "xapi-nbd")
	u.pulls(t, local)
	u.systemctl(t, "restart", "xapi-nbd")
	u.pulls(t, local)
	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	u.pulls(t, local)
	if log := readFile(t, dir+"/log"); !strings.Contains(log, "log lines were dropped") {
		t.Errorf("the log does not tell of lost lines:\n%s", log)
	}
	u.configure(t, "", "")
	u.systemctl(t, "restart", "xapi-nbd")
}

// stuckLog: standard error is a pipe that its reader does not read.
func (u *unit) stuckLog(t *testing.T) {
	const fifo = "/srv/fifo"
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	reader, err := os.OpenFile(fifo, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	if _, err := unix.FcntlInt(reader.Fd(), unix.F_SETPIPE_SZ, 4096); err != nil {
		t.Fatal(err)
	}
	u.configure(t, "log_level = \"debug\"\n", "StandardError=file:"+fifo+"\n")
	u.systemctl(t, "restart", "xapi-nbd")
	for range 30 { // more lines than the pipe takes
		u.pulls(t, local)
	}
	if out := must(t, "xapi-nbd", "status"); !strings.Contains(out, "serving") {
		t.Errorf("status:\n%s", out)
	}
	begin := time.Now()
	u.systemctl(t, "stop", "xapi-nbd")
	if took := time.Since(begin); took > 15*time.Second {
		t.Errorf("the stop took %v", took)
	}
	if result := u.property(t, "Result"); result != "success" {
		t.Errorf("the result of the service is %s", result)
	}
}

// wrongSettings: only an error that an administrator has to correct stops the service
// permanently, and at once.
func (u *unit) wrongSettings(t *testing.T) {
	u.configure(t, "port = \"many\"\n", "")
	if out, err := exec.Command("systemctl", "restart", "xapi-nbd").CombinedOutput(); err == nil {
		t.Errorf("it starts: %s", out)
	}
	u.waitProperty(t, "ActiveState", "is failed", func(state string) bool { return state == "failed" })
	if status := u.property(t, "ExecMainStatus"); status != "2" {
		t.Errorf("exit status %s, want 2", status)
	}
}

// fullDisk mounts a small file system until the end of the test and fills it. The
// file that fills it is returned.
func fullDisk(t *testing.T, dir string) (fill string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("full", dir, "tmpfs", 0, "size=256k,mode=755"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	for _, name := range []string{"lock", "log"} { // are there already on a disk that fills up
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	fill = filepath.Join(dir, "fill")
	_ = os.WriteFile(fill, make([]byte, 1<<20), 0o600) // as much as there is room for
	return fill
}
