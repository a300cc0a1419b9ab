package vm

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"xapi-nbd/test/requires"
)

// TestXen runs the tests that need Xen's block devices, in a domain 0.
func TestXen(t *testing.T) { runInGuest(t, "boot-xen.sh", 1, machineTools...) }

// TestKernel runs the tests that need the kernel's NBD devices. The kernel uses several
// connections of a device only on several processors.
func TestKernel(t *testing.T) { runInGuest(t, "boot-linux.sh", 2, machineTools...) }

// machineTools are the programs that make virtual machines.
var machineTools = []string{"qemu-system-x86_64", "mmdebstrap", "busybox", "cpio", "depmod", "xz", "mke2fs"}

// TestSystemd runs the tests that need systemd, which is process 1 of new namespaces.
func TestSystemd(t *testing.T) {
	runInGuest(t, "boot-systemd.sh", 0, "mmdebstrap", "unshare", "nsenter", "findmnt", "rpmbuild")
}

const (
	guestLimit = "1500" // seconds; a tenth of that is usual on two free processors
	// noStatus is the exit status of the boot scripts for guests that had none.
	noStatus = 125
	// endPatience is for how long a boot script may take to end its guest.
	endPatience = 20 * time.Second
)

// runInGuest runs the test of the same name in package guest, in a guest, and
// makes its subtests subtests of t.
func runInGuest(t *testing.T, boot string, cpus int, tools ...string) {
	if os.Getenv("VM") != "1" {
		t.Skip("boots a guest: make test-vm, or VM=1, runs it")
	}
	requires.Root(t)
	for _, tool := range tools {
		requires.Tool(t, tool)
	}
	dir := t.TempDir()
	build(t, dir)
	if boot == "boot-systemd.sh" {
		buildPackages(t, filepath.Join(dir, "packages"))
	}

	command := "VM_GUEST=1 ./guest.test -test.v=test2json -test.timeout=24m -test.run '^" + t.Name() + "$'"
	cmd := exec.CommandContext(t.Context(), "bash", boot, "-d", dir, "-s", strconv.Itoa(cpus), "-t", guestLimit, command)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = endPatience
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	t.Logf("%s:\n%s", boot, stderr.String())
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && exit.ExitCode() == noStatus:
		t.Errorf("infrastructure: the guest gave no status; its output:\n%s", stdout.String())
	case err != nil && !errors.As(err, &exit):
		t.Fatalf("infrastructure: %v", err)
	}

	results := convert(t, stdout.Bytes())
	results.report(t)
	passed := results.ended[t.Name()] == "pass"
	if passed != (err == nil) {
		t.Errorf("the guest's test ended with %q, its process with %v; its output:\n%s", results.ended[t.Name()], err, stdout.String())
	}
}

// build writes the files of the guest into dir: static programs, and units.
func build(t *testing.T, dir string) {
	t.Helper()
	for _, args := range [][]string{
		{"build", "-trimpath", "-o", dir + "/", "xapi-nbd/cmd/xapi-nbd", "xapi-nbd/cmd/nbd-tool"},
		{"test", "-c", "-o", filepath.Join(dir, "guest.test"), "xapi-nbd/test/vm/guest"},
	} {
		run(t, "env", append([]string{"CGO_ENABLED=0", "go"}, args...)...)
	}
	for _, unit := range []string{"xapi-nbd.service", "xapi-nbd.service.d/hardening.conf"} {
		text, err := os.ReadFile(filepath.Join("../../packaging", unit))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, filepath.Base(unit)), text, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// buildPackages builds the Debian package, and two releases of the binary RPM in folders of
// their own.
func buildPackages(t *testing.T, dir string) {
	t.Helper()
	run(t, "../../packaging/build-deb.sh", dir)
	top := t.TempDir()
	run(t, "../../packaging/build-rpm.sh", top)
	moveOnly(t, filepath.Join(top, "RPMS/*/*.rpm"), filepath.Join(dir, "first"))
	source, err := filepath.Glob(filepath.Join(top, "SRPMS/*.rpm"))
	if err != nil || len(source) != 1 {
		t.Fatalf("source packages: got %v, %v, want one", source, err)
	}
	run(t, "rpmbuild", "--rebuild", "--nodeps", "--define", "_topdir "+top, "--define", "xsrel .2", source[0])
	moveOnly(t, filepath.Join(top, "RPMS/*/*.rpm"), filepath.Join(dir, "second"))
}

// moveOnly moves the only file that matches the pattern into a new folder.
func moveOnly(t *testing.T, pattern, dir string) {
	t.Helper()
	files, err := filepath.Glob(pattern)
	if err != nil || len(files) != 1 {
		t.Fatalf("%s: got %v, %v, want one file", pattern, files, err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, "mv", files[0], dir)
}

// run runs a program that must succeed.
func run(t *testing.T, program string, args ...string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), program, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", program, strings.Join(args, " "), err, out)
	}
}

// outcome has the results of the tests in a guest.
type outcome struct {
	order  []string            // in which they began
	ended  map[string]string   // "pass", "fail" or "skip"; absent if it did not end
	output map[string][]string // lines
}

// convert understands the output of a test binary, by the converter of go test.
func convert(t *testing.T, output []byte) outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", "tool", "test2json")
	cmd.Stdin = bytes.NewReader(output)
	events, err := cmd.Output()
	if err != nil {
		t.Fatalf("go tool test2json: %v", err)
	}
	return parse(t, events)
}

// parse reads the events of go test -json.
func parse(t *testing.T, events []byte) outcome {
	t.Helper()
	o := outcome{ended: map[string]string{}, output: map[string][]string{}}
	scanner := bufio.NewScanner(bytes.NewReader(events))
	scanner.Buffer(nil, 1<<20)
	for scanner.Scan() {
		var e struct{ Action, Test, Output string }
		if err := json.Unmarshal(scanner.Bytes(), &e); err != nil {
			t.Fatalf("go tool test2json: %v in %q", err, scanner.Text())
		}
		switch e.Action {
		case "run":
			o.order = append(o.order, e.Test)
		case "pass", "fail", "skip":
			o.ended[e.Test] = e.Action
		case "output":
			o.output[e.Test] = append(o.output[e.Test], e.Output)
		}
	}
	if err := scanner.Err(); err != nil {
		t.Fatal(err)
	}
	return o
}

// text returns the output of a test without its first and last line.
func (o outcome) text(name string) string {
	lines := slices.DeleteFunc(slices.Clone(o.output[name]), func(line string) bool {
		line = strings.TrimSpace(line)
		return line == "" || strings.HasPrefix(line, "=== ") || strings.HasPrefix(line, "--- ")
	})
	return strings.Join(lines, "")
}

// report makes subtests of those that ran in the guest, each with its output.
func (o outcome) report(t *testing.T) {
	ran := 0
	for _, name := range o.order {
		sub, ok := strings.CutPrefix(name, t.Name()+"/")
		if !ok {
			continue
		}
		ran++
		t.Run(sub, func(t *testing.T) {
			text := o.text(name)
			switch o.ended[name] {
			case "pass":
				if text != "" {
					t.Log("\n" + text)
				}
			case "skip":
				t.Skip("\n" + text)
			case "fail":
				t.Error("\n" + text)
			default:
				t.Errorf("it did not end\n%s", text)
			}
		})
	}
	if ran == 0 {
		t.Errorf("no test ran in the guest; its output:\n%s", strings.Join(o.output[""], ""))
	}
}
