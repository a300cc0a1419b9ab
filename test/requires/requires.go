// Package requires is for tests that need more than Go and an ordinary user: installed
// programs, root, loop devices. Each function skips its test, with the reason, where that
// is missing, and in short mode (go test -short). STRICT=1 in the environment turns a skip
// for a missing thing into a failure, so that CI does not take it for a pass.
package requires

import (
	_ "embed" // for tools.txt
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

// TB is the part of testing.TB that is used here. With it, programs that share code with
// tests do not link the testing package and its flags.
type TB interface {
	Helper()
	Skipf(format string, args ...any)
	Fatalf(format string, args ...any)
}

//go:embed tools.txt
var toolsFile string

// Tool returns the path of a program, or ends the test if it is not installed. It also
// looks in the sbin directories, which an ordinary user's PATH lacks. tools.txt lists the
// programs that the project's tests use, with their Debian packages.
func Tool(tb TB, name string) string {
	tb.Helper()
	if skippedInShort(tb, name) {
		return ""
	}
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

// PythonModule returns the path of Debian's Python, or ends the test if that does not have
// the module, which tools.txt lists as python:NAME.
func PythonModule(tb TB, name string) (python string) {
	tb.Helper()
	if skippedInShort(tb, "the Python module "+name) {
		return ""
	}
	python = "/usr/bin/python3" // another Python does not have Debian's modules
	if err := exec.Command(python, "-c", "import "+name).Run(); err != nil {
		missing(tb, fmt.Sprintf("needs the Python module %s (Debian package %s)", name, packageOf("python:"+name)))
		return ""
	}
	return python
}

// Root ends the test unless it runs as root.
func Root(tb TB) {
	tb.Helper()
	if skippedInShort(tb, "root") {
		return
	}
	if os.Geteuid() != 0 {
		missing(tb, "needs root")
	}
}

// Cgroup2 ends the test unless a cgroup2 file system is mounted, without which a systemd
// that a test starts does not run.
func Cgroup2(tb TB) {
	tb.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || !strings.Contains(string(mounts), " cgroup2 ") {
		missing(tb, "no cgroup2 file system is mounted")
	}
}

// LoopDevices ends the test unless it may set up loop devices; root alone is not enough
// in a container.
func LoopDevices(tb TB) {
	tb.Helper()
	if skippedInShort(tb, "loop devices") {
		return
	}
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

// skippedInShort skips a test in short mode, and reports whether it did: `make test-short`
// has the same result on every machine.
func skippedInShort(tb TB, need string) bool {
	tb.Helper()
	short := flag.Lookup("test.short") // testing.Short without the testing package
	if short == nil || short.Value.String() != "true" {
		return false
	}
	tb.Skipf("needs %s, which short mode does not use", need)
	return true
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
		if f := strings.Fields(line); len(f) >= 2 && f[0] == tool {
			return f[1]
		}
	}
	return ""
}
