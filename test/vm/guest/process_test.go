package guest

import (
	"bufio"
	"bytes"
	"io"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// process is a program of ours that runs until the end of the test.
type process struct {
	t     *testing.T
	cmd   *exec.Cmd
	ended chan struct{} // closed when it has exited

	mu      sync.Mutex // guards the fields below
	text    bytes.Buffer
	eof     bool
	changed chan struct{} // closed, and made anew, when there is more
}

// launch starts a program. Its output is shown if the test fails.
func launch(t *testing.T, name string, args ...string) *process {
	t.Helper()
	p := &process{t: t, cmd: exec.Command(program(t, name), args...), ended: make(chan struct{}), changed: make(chan struct{})}
	out, in := io.Pipe()
	p.cmd.Stdout, p.cmd.Stderr = in, in
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = p.cmd.Wait() // its state says the same
		_ = in.Close()
		close(p.ended)
	}()
	read := make(chan struct{})
	go func() {
		defer close(read)
		for scanner := bufio.NewScanner(out); scanner.Scan(); {
			p.add(scanner.Text()+"\n", false)
		}
		p.add("", true)
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		<-read
		if t.Failed() {
			t.Logf("output of %s:\n%s", name, p.output())
		}
	})
	return p
}

func (p *process) add(line string, eof bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.text.WriteString(line)
	p.eof = eof
	close(p.changed)
	p.changed = make(chan struct{})
}

func (p *process) output() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.text.String()
}

// waitLine waits for a line that contains text, and returns it.
func (p *process) waitLine(text string) string {
	p.t.Helper()
	limit := time.NewTimer(patience)
	defer limit.Stop()
	for {
		p.mu.Lock()
		output, eof, changed := p.text.String(), p.eof, p.changed
		p.mu.Unlock()
		for line := range strings.Lines(output) {
			if strings.Contains(line, text) {
				return line
			}
		}
		if eof {
			p.t.Fatalf("ended without a line with %q", text)
		}
		select {
		case <-changed:
		case <-limit.C:
			p.t.Fatalf("printed no line with %q", text)
		}
	}
}

// kill is kill -9.
func (p *process) kill() {
	p.t.Helper()
	if err := p.cmd.Process.Kill(); err != nil {
		p.t.Fatal(err)
	}
	<-p.ended
}

// stop sends SIGTERM and expects exit code 0.
func (p *process) stop() {
	p.t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		p.t.Fatal(err)
	}
	select {
	case <-p.ended:
	case <-time.After(patience):
		p.t.Fatal("still running after SIGTERM")
	}
	if code := p.cmd.ProcessState.ExitCode(); code != 0 {
		p.t.Errorf("exit code: got %d, want 0", code)
	}
}
