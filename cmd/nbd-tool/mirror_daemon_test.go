package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"xapi-nbd/cmd/nbd-tool/internal/control"
)

// toolProcess returns nbd-tool as a process of its own, which is not started yet.
func toolProcess(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), toolEnv+"=1")
	return cmd
}

// startProcess starts nbd-tool as a process that serves, and returns when it does. The process is
// killed at the end of the test.
func startProcess(t *testing.T, args ...string) (cmd *exec.Cmd, errOut *syncBuffer) {
	t.Helper()
	cmd, errOut = toolProcess(t, args...), new(syncBuffer)
	cmd.Stderr = errOut
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); !strings.HasPrefix(line, "listening on ") {
		t.Fatalf("%q: got %q, %v, error output %s", args, line, err, errOut)
	}
	return cmd, errOut
}

// watchControl connects to a control socket. The function that it returns waits until the
// process that listens there has closed the connection, as it does when it ends.
func watchControl(t *testing.T, path string) (wait func()) {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return func() { _, _ = io.Copy(io.Discard, c) }
}

// TestMirrorDaemon: the command returns when clients are served, and closes what would keep the
// one who has called it waiting.
func TestMirrorDaemon(t *testing.T) {
	dir, disk := shortDir(t), content(mirrorSize)
	primary, secondary := writeFile(t, "primary", disk), filepath.Join(t.TempDir(), "secondary")
	ctl := filepath.Join(dir, "ctl")
	cmd := toolProcess(t, "mirror", "--daemon", "--listen=unix:"+dir+"/nbd", "--control=unix:"+ctl, primary, secondary)
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	inherited, other, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer inherited.Close()
	// The daemon gets another file in place of the first one.
	cmd.ExtraFiles = []*os.File{other, other}
	out, err := cmd.Output() // until all have closed its standard output
	other.Close()
	if err != nil || string(out) != "listening on unix:"+dir+"/nbd\n" {
		t.Fatalf("%v: got %q, error output %q", err, out, errOut.String())
	}
	var s control.Status
	if err := json.Unmarshal([]byte(succeed(t, "ctl", ctl, "status", "--json")), &s); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Kill(s.PID, syscall.SIGKILL) })
	_ = inherited.SetReadDeadline(time.Now().Add(30 * time.Second))
	if _, err := inherited.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("reading a pipe whose other end the command inherited: got %v, want that the daemon has closed it", err)
	}
	if s.PID == cmd.Process.Pid || s.Listening[0] != "unix:"+dir+"/nbd" {
		t.Errorf("got %+v", s)
	}
	if sid, _, errno := syscall.Syscall(syscall.SYS_GETSID, uintptr(s.PID), 0, 0); int(sid) != s.PID {
		t.Errorf("its session is %d (%v), want its own, %d", sid, errno, s.PID)
	}
	if err := syscall.Kill(s.PID, syscall.SIGHUP); err != nil { // its terminal is closed
		t.Fatal(err)
	}
	ended := watchControl(t, ctl)
	succeed(t, "ctl", ctl, "complete", "--stop", "--verify")
	ended()
	sameBytes(t, "secondary", readFile(t, secondary), disk)
}

// TestMirrorDaemonFails: an error before clients are served is that of the command, with its exit
// code.
func TestMirrorDaemonFails(t *testing.T) {
	disk := writeFile(t, "disk", content(1<<20))
	for want, code := range map[string]int{"/no/such/file": exitFailed, "is both PRIMARY and SECONDARY": exitUsage} {
		other := disk
		if code == exitFailed {
			other = want
		}
		cmd := toolProcess(t, "mirror", "--daemon", "--listen=127.0.0.1:0", other, disk)
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != code || !strings.Contains(string(out), want) {
			t.Errorf("got %v and %q, want exit code %d and %q", err, out, code, want)
		}
		if n := bytes.Count(out, []byte(want)); n != 1 {
			t.Errorf("the error is printed %d times: %q", n, out)
		}
	}
}

// TestMirrorDaemonInterrupted: a signal to the command ends the process in the background, too.
func TestMirrorDaemonInterrupted(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0") // a server that never greets
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cmd := toolProcess(t, "mirror", "--daemon", "--listen=127.0.0.1:0", "nbd://"+l.Addr().String(), writeFile(t, "disk", content(512)))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, c) // until the process in the background has ended
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != exitFailed {
		t.Errorf("got %v, want exit code %d", err, exitFailed)
	}
}
