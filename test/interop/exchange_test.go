package interop

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"xapi-nbd/test/requires"
)

// mode is the way in which a client opens the export.
type mode struct{ secure, old bool }

func (m mode) String() string {
	return map[bool]string{false: "clear", true: "TLS"}[m.secure] + ", " +
		map[bool]string{false: "GO", true: "EXPORT_NAME"}[m.old]
}

// exchange is one client with one disk in one mode.
type exchange struct {
	mode
	w       *world
	t       *testing.T
	addr    string // where the client connects to: the service, or a relay
	name    string // of the export
	content []byte // of the disk
}

// newExchange returns an exchange about a VDI of w with a new session.
func newExchange(t *testing.T, w *world, m mode, vdi string, content []byte) *exchange {
	x := &exchange{mode: m, w: w, t: t, addr: w.service.addr, name: w.export(vdi), content: content}
	if m.old && !m.secure {
		x.join(&relay{})
	}
	return x
}

// join puts a relay between the client and the service. Over TLS a relay cannot act like an
// old server.
func (x *exchange) join(r *relay) *relay {
	r.old = x.old && !x.secure
	r.start(x.t, x.w.service.addr)
	x.addr = r.addr
	return r
}

// hostPort returns host and port of the address.
func (x *exchange) hostPort() (host, port string) {
	x.t.Helper()
	host, port, err := net.SplitHostPort(x.addr)
	if err != nil {
		x.t.Fatal(err)
	}
	return host, port
}

// uri returns the URI of the export for libnbd's programs: with two slashes and an encoded
// question mark.
func (x *exchange) uri() string {
	path := "/" + strings.ReplaceAll(x.name, "?", "%3F")
	if x.secure {
		return "nbds://" + x.addr + path + "?tls-certificates=" + x.w.trust
	}
	return "nbd://" + x.addr + path
}

// command returns the command of a program that must be installed.
func (x *exchange) command(program string, args ...string) *exec.Cmd {
	x.t.Helper()
	ctx, cancel := context.WithTimeout(x.t.Context(), timeout)
	x.t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, requires.Tool(x.t, program), args...)
	cmd.Dir = x.t.TempDir() // fio leaves files
	// The bindings are those of the distribution's Python, which may not be the first in
	// PATH.
	cmd.Env = append(os.Environ(), "PATH=/usr/bin:/bin:"+os.Getenv("PATH"))
	// A new process group, so that it can be killed with its children.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return killGroup(cmd) }
	return cmd
}

func killGroup(cmd *exec.Cmd) error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }

// run runs a program that must succeed and returns its standard output.
func (x *exchange) run(cmd *exec.Cmd) string {
	x.t.Helper()
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		x.t.Fatalf("%s: %v\n%s%s", filepath.Base(cmd.Path), err, &out, &errOut)
	}
	return out.String()
}

// refused runs a program that must fail and returns its output.
func (x *exchange) refused(cmd *exec.Cmd) string {
	x.t.Helper()
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || !exit.Exited() {
		x.t.Fatalf("%s: got error %v, want an exit status of failure; it printed:\n%s", filepath.Base(cmd.Path), err, out)
	}
	return string(out)
}

// file returns a new path. It is not in t.TempDir, whose name has commas, which end an
// option of qemu.
func (x *exchange) file(name string) string {
	x.t.Helper()
	dir, err := os.MkdirTemp(x.w.dir, "files")
	if err != nil {
		x.t.Fatal(err)
	}
	x.t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, name)
}

func (x *exchange) wantFile(path string, want []byte) {
	x.t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		x.t.Fatal(err)
	}
	x.wantBytes(filepath.Base(path), got, want)
}

func (x *exchange) wantBytes(name string, got, want []byte) {
	x.t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	first := 0
	for first < min(len(got), len(want)) && got[first] == want[first] {
		first++
	}
	x.t.Errorf("%s: got %d bytes, want %d; they differ from byte %d on", name, len(got), len(want), first)
}

// action makes a client do something.
type action func(x *exchange)

// copying returns the command with which a client copies the whole disk to a file.
type copying func(x *exchange, out string) *exec.Cmd

// copies copies the whole disk and compares it.
func copies(c copying) action {
	return func(x *exchange) {
		out := x.file("disk")
		x.run(c(x, out))
		x.wantFile(out, x.content)
	}
}

// dies kills the client during a copy.
func dies(c copying) action {
	return func(x *exchange) {
		r := x.join(&relay{limit: diskSize / 4, then: hold})
		cmd := c(x, x.file("disk"))
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			x.t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		select {
		case <-r.reached:
		case err := <-ended:
			x.t.Fatalf("the client ended before the middle: %v\n%s", err, &out)
		case <-time.After(timeout):
			_ = killGroup(cmd)
			<-ended
			x.t.Fatalf("the client did not come to the middle\n%s", &out)
		}
		if vbds := x.w.host.VBDs(); len(vbds) != 1 || !vbds[0].CurrentlyAttached {
			x.t.Errorf("VBDs in the middle: got %+v, want one that is attached", vbds)
		}
		if err := killGroup(cmd); err != nil {
			x.t.Error(err)
		}
		<-ended
	}
}

// span is a part of the disk, in whole sectors.
type span struct{ offset, length int }

// spans returns parts of the disk in random order: short and long ones, the first and the
// last bytes, and some that overlap.
var spans = []span{
	{20 << 20, 4096}, {512, 512}, {diskSize - 512, 512}, {7<<20 + 1536, 65536}, {0, 8192}, {20<<20 + 2048, 8192},
	{31 << 20, 1 << 20}, {12345 * 512, 37 * 512}, {3 << 20, 512}, {3<<20 - 512, 1024},
}

// wantSpans compares a file that contains the spans one after the other.
func (x *exchange) wantSpans(path string) {
	x.t.Helper()
	var want []byte
	for _, s := range spans {
		want = append(want, x.content[s.offset:s.offset+s.length]...)
	}
	x.wantFile(path, want)
}

// contentFile has the content of the disk.
func (x *exchange) contentFile() string {
	path := x.file("content")
	if err := os.WriteFile(path, x.content, 0o600); err != nil {
		x.t.Fatal(err)
	}
	return path
}
