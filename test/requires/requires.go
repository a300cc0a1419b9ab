// Package requires is for tests that need more of the machine than Go: it skips
// them with the reason, or fails them where STRICT=1 promises that everything
// is there (as in CI), so that a skip is never mistaken for a pass.
package requires

import (
	_ "embed" // for tools.txt
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

// TB is the part of testing.TB that is used here; programs that share code with
// tests thereby do not link the testing package and its flags.
type TB interface {
	Helper()
	Skipf(format string, args ...any)
	Fatalf(format string, args ...any)
}

//go:embed tools.txt
var toolsFile string

// Tool returns the path of a program, or ends the test. It also looks in the
// directories for administrators, which an ordinary user's PATH lacks. Programs
// that the project's tests use are listed in tools.txt with their package.
func Tool(tb TB, name string) string {
	tb.Helper()
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path
		}
	}
	reason := "needs " + name
	if p := packageOf(name); p != "" {
		reason = fmt.Sprintf("needs %s (Debian package %s)", name, p)
	}
	missing(tb, reason)
	return ""
}

// Root ends the test unless it runs as root.
func Root(tb TB) {
	tb.Helper()
	if os.Geteuid() != 0 {
		missing(tb, "needs root")
	}
}

// Cgroup2 requires a file system of control groups of the second version, which a
// systemd that is started by a test needs.
func Cgroup2(tb TB) {
	tb.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || !strings.Contains(string(mounts), " cgroup2 ") {
		missing(tb, "no cgroup2 file system is mounted")
	}
}

// LoopDevices ends the test unless it may set up loop devices: being root is
// not enough in a container.
func LoopDevices(tb TB) {
	tb.Helper()
	if os.Geteuid() != 0 {
		missing(tb, "needs loop devices, and those need root")
		return
	}
	losetup := Tool(tb, "losetup")
	if losetup == "" {
		return
	}
	out, err := exec.Command(losetup, "--find").Output() // makes a new one if all are taken
	if err != nil {
		missing(tb, "needs loop devices (losetup --find: "+err.Error()+")")
		return
	}
	dev, err := os.OpenFile(strings.TrimSpace(string(out)), os.O_RDWR, 0)
	if err != nil {
		missing(tb, "needs loop devices ("+err.Error()+")")
		return
	}
	dev.Close()
}

// DirectIO ends the test unless files in dir can be opened with O_DIRECT.
func DirectIO(tb TB, dir string) {
	tb.Helper()
	f, err := os.OpenFile(filepath.Join(dir, "probe"), os.O_RDWR|os.O_CREATE|syscall.O_DIRECT, 0o600)
	if err != nil {
		missing(tb, "needs files with O_DIRECT ("+err.Error()+")")
		return
	}
	f.Close()
}

func missing(tb TB, reason string) {
	tb.Helper()
	if os.Getenv("STRICT") == "1" {
		tb.Fatalf("%s, and STRICT=1 allows no skip", reason)
		return
	}
	tb.Skipf("%s", reason)
}

func packageOf(tool string) string {
	for line := range strings.Lines(toolsFile) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == tool {
			return f[1]
		}
	}
	return ""
}
