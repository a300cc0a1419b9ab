package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// process is nbd-tool in a process of its own.
type process struct {
	*exec.Cmd
	t     *testing.T
	ended chan struct{} // closed when it has ended
}

// startTool starts a process with these standard streams, of which it closes this process's copy.
func startTool(t *testing.T, stdout, stderr *os.File, args ...string) *process {
	t.Helper()
	p := &process{exec.Command(os.Args[0], args...), t, make(chan struct{})}
	p.Env = append(os.Environ(), toolEnv+"=1")
	p.Stdout, p.Stderr = stdout, stderr
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	stdout.Close()
	stderr.Close()
	go func() {
		defer close(p.ended)
		_ = p.Wait()
	}()
	t.Cleanup(func() {
		_ = p.Process.Kill()
		<-p.ended
	})
	return p
}

// pipe returns the ends of a pipe.
func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r, w
}

// readLine returns a line of the output of the process.
func (p *process) readLine(from *bufio.Reader) string {
	p.t.Helper()
	line, err := from.ReadString('\n')
	if err != nil {
		<-p.ended
		p.t.Fatalf("got %q, %v; the process has ended: %v", line, err, p.ProcessState)
	}
	return line
}

// waitFor waits until a command of the tool succeeds, as long as the process lives.
func (p *process) waitFor(args ...string) {
	p.t.Helper()
	for tool(p.t, args...).code != exitOK {
		select {
		case <-p.ended:
			p.t.Fatalf("the process has ended: %v", p.ProcessState)
		default:
		}
	}
}

// reloadable configuration: an export for each name, on the first n unix sockets.
func writeServeConfig(t *testing.T, dir string, sockets int, names ...string) (path string) {
	t.Helper()
	var text strings.Builder
	text.WriteString("listen = ['unix:" + dir + "/1'")
	for i := 2; i <= sockets; i++ {
		fmt.Fprintf(&text, ", 'unix:%s/%d'", dir, i)
	}
	text.WriteString("]\n")
	for _, name := range names {
		fmt.Fprintf(&text, "[[export]]\nname = '%s'\npath = '%s/disk'\n", name, dir)
	}
	path = filepath.Join(dir, "exports.toml")
	for file, content := range map[string]string{path: text.String(), dir + "/disk": strings.Repeat("x", 512)} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

// socketFolder returns a folder with a short name, as those of sockets must be short.
func socketFolder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd-tool")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// TestServeSurvivesAClosedOutput: a server whose standard output nobody reads any more goes on
// when a reload adds an address.
func TestServeSurvivesAClosedOutput(t *testing.T) {
	dir := socketFolder(t)
	config := writeServeConfig(t, dir, 1, "a")
	stdout, w := pipe(t)
	stderr, w2 := pipe(t)
	p := startTool(t, w, w2, "serve", "--config", config)
	if line := p.readLine(bufio.NewReader(stdout)); !strings.HasPrefix(line, "listening on unix:") {
		t.Fatalf("got %q", line)
	}
	stdout.Close()
	writeServeConfig(t, dir, 2, "a")
	if err := p.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	for log := bufio.NewReader(stderr); ; {
		line := p.readLine(log)
		if strings.Contains(line, "the new addresses could not be printed") {
			if !strings.Contains(line, "unix:"+dir+"/2") {
				t.Errorf("got %q, want the new address", line)
			}
			break
		}
	}
	for _, socket := range []string{"1", "2"} {
		if got := succeed(t, "size", "nbd+unix:///a?socket="+dir+"/"+socket); got != "512\n" {
			t.Errorf("socket %s: got %q", socket, got)
		}
	}
}

// TestServeSurvivesAClosedLog: a server whose log nobody reads any more goes on.
func TestServeSurvivesAClosedLog(t *testing.T) {
	dir := socketFolder(t)
	config := writeServeConfig(t, dir, 1, "a")
	stdout, w := pipe(t)
	stderr, w2 := pipe(t)
	p := startTool(t, w, w2, "serve", "--config", config)
	p.readLine(bufio.NewReader(stdout))
	stderr.Close()
	// The second reload comes after the line of the log about the first one.
	for _, name := range []string{"b", "c"} {
		writeServeConfig(t, dir, 1, name)
		if err := p.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		p.waitFor("size", "nbd+unix:///"+name+"?socket="+dir+"/1")
	}
}

// TestCopySurvivesAClosedProgress: a copy whose progress nobody reads any more comes to its end.
func TestCopySurvivesAClosedProgress(t *testing.T) {
	want := content(1 << 20)
	_, out := pipe(t)
	stderr, w := pipe(t)
	stderr.Close()
	dst := filepath.Join(t.TempDir(), "dst")
	p := startTool(t, out, w, "copy", "--progress", "--verify", writeFile(t, "src", want), dst)
	<-p.ended
	if code := p.ProcessState.ExitCode(); code != exitOK {
		t.Errorf("got %v, want exit code 0", p.ProcessState)
	}
	sameBytes(t, "the copy", readFile(t, dst), want)
}
