package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"xapi-nbd/cmd/xapi-nbd/internal/servicetest"
	"xapi-nbd/internal/testcert"
	"xapi-nbd/nbd/client"
	"xapi-nbd/xapi/xapitest"
)

// patience bounds every wait of these tests. No step is expected to take that long.
const patience = servicetest.Timeout

var (
	random     = servicetest.Random
	eventually = servicetest.Eventually
	lacking    = servicetest.Lacking
)

// world is a simulated host for one service.
type world struct {
	*servicetest.World
	t       *testing.T
	dir     string
	host    *xapitest.Host
	network string
	trust   *testcert.Files

	childFiles []*os.File // further descriptors of the service, from 3 on
	program    string     // the program of the service; "" is this test binary
}

func newWorld(t *testing.T, cfg xapitest.Config) *world {
	t.Helper()
	w := servicetest.NewWorld(t, cfg)
	return &world{World: w, t: t, dir: w.Dir, host: w.Host, network: w.Network, trust: w.Trust}
}

// addVDI adds a disk whose content is data.
func (w *world) addVDI(data []byte, spec xapitest.VDISpec) (uuid string) {
	w.t.Helper()
	return w.AddVDI(data, spec)
}

// session returns the ref of a new session, which must not be in any output.
func (w *world) session(role xapitest.Role) string { return w.Session(role) }

// export returns an export name for the VDI with a new session.
func (w *world) export(vdi string) string { return w.Export(vdi) }

// file writes a file into the folder of the world and returns its path.
func (w *world) file(name, text string) string {
	w.t.Helper()
	return w.File(name, text)
}

func (w *world) journal() string {
	data, err := os.ReadFile(filepath.Join(w.dir, "state", "VBDs_to_clean_up"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		w.t.Fatal(err)
	}
	return string(data)
}

// waitClean waits until no VBD is left and requires that the journal becomes empty.
func (w *world) waitClean(p *process) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := w.host.Wait(ctx, func(vbds []xapitest.VBD) bool { return len(vbds) == 0 }); err != nil {
		w.t.Fatalf("VBDs left: %+v\n%s", w.host.VBDs(), p.output())
	}
	// The service removes the entry right after the VBD, without a call that the host could
	// report.
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for w.journal() != "" {
		select {
		case <-tick.C:
		case <-ctx.Done():
			w.t.Fatalf("journal: got %q, want it empty\n%s", w.journal(), p.output())
		}
	}
	if p != nil {
		if open := p.openDevices(w); len(open) != 0 {
			w.t.Errorf("devices still open: %q", open)
		}
	}
}

// process is a running xapi-nbd.
type process struct {
	t     *testing.T
	cmd   *exec.Cmd
	addr  string
	ended chan struct{} // closed when it has exited

	mu    sync.Mutex // guards the fields below
	text  bytes.Buffer
	lines *sync.Cond
	eof   bool
}

// args returns a command line of the service for this world.
func (w *world) args(more ...string) []string {
	return append([]string{
		"serve", "--listen=127.0.0.1:0", "--certfile=" + w.trust.Server, "--xapi-socket=" + w.host.Socket(),
		"--inventory=" + w.host.Inventory(), "--device-dir=" + w.host.DeviceDir(),
		"--state-dir=" + filepath.Join(w.dir, "state"), "--log-level=debug",
	}, more...)
}

// start runs the service until the end of the test, when its output is searched for secrets.
// It returns when the service listens and xapi has answered.
func (w *world) start(more ...string) *process {
	w.t.Helper()
	p := w.launch(more...)
	p.addr = p.waitAddr()
	p.waitLine("ready to serve")
	return p
}

var listening = regexp.MustCompile(`listening on ([^\s",]+)`)

// waitAddr waits until the service listens and returns its address.
func (p *process) waitAddr() string {
	p.t.Helper()
	return listening.FindStringSubmatch(p.waitLine("listening on "))[1]
}

// launch is start without the waiting.
func (w *world) launch(more ...string) *process {
	w.t.Helper()
	p := &process{t: w.t, cmd: exec.Command(cmp.Or(w.program, os.Args[0]), w.args(more...)...), ended: make(chan struct{})}
	p.lines = sync.NewCond(&p.mu)
	p.cmd.Env = append(os.Environ(), childEnv+"=1")
	p.cmd.ExtraFiles = w.childFiles
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	go func() {
		defer close(p.ended)
		scanner := bufio.NewScanner(stderr)
		for scanner.Scan() {
			p.add(scanner.Text() + "\n")
		}
		_ = p.cmd.Wait()
		p.mu.Lock()
		p.eof = true
		p.lines.Broadcast()
		p.mu.Unlock()
	}()
	w.t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		<-p.ended
		w.WantNoSecrets("the log", p.output())
		if w.t.Failed() {
			w.t.Logf("output of the service:\n%s", p.output())
		}
	})
	return p
}

func (p *process) add(line string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.text.WriteString(line)
	p.lines.Broadcast()
}

func (p *process) output() string {
	if p == nil {
		return ""
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.text.String()
}

// waitLine waits for a line of output that contains text.
func (p *process) waitLine(text string) string {
	p.t.Helper()
	defer time.AfterFunc(patience, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.eof = true
		p.lines.Broadcast()
	}).Stop()
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		for line := range strings.Lines(p.text.String()) {
			if strings.Contains(line, text) {
				return line
			}
		}
		if p.eof {
			p.t.Fatalf("the service ended, or took too long, without writing %q:\n%s", text, p.text.String())
		}
		p.lines.Wait()
	}
}

// stop sends SIGTERM and returns the exit code, which must come in time.
func (p *process) stop(within time.Duration) int {
	p.t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		p.t.Fatal(err)
	}
	return p.exitCode(within, "SIGTERM")
}

// exitCode waits until the process ends by itself and returns its exit code.
func (p *process) exitCode(within time.Duration, after string) int {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(within):
		p.t.Fatalf("still running %v after %s:\n%s", within, after, p.output())
	}
	return p.cmd.ProcessState.ExitCode()
}

func (p *process) kill() {
	p.t.Helper()
	if err := p.cmd.Process.Kill(); err != nil {
		p.t.Fatal(err)
	}
	<-p.ended
}

// openDevices lists the loop devices and images that the process has open.
func (p *process) openDevices(w *world) (open []string) {
	p.t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid)
	fds, err := os.ReadDir(dir)
	if err != nil {
		return nil // it has ended
	}
	for _, fd := range fds {
		target, err := os.Readlink(filepath.Join(dir, fd.Name()))
		if err == nil && (strings.HasPrefix(target, "/dev/loop") || strings.HasPrefix(target, filepath.Join(w.dir, "image"))) {
			open = append(open, target)
		}
	}
	return open
}

// dial connects and greets, with TLS or without.
func (w *world) dial(p *process, secure bool) (*client.Client, error) {
	return w.Dial("tcp", p.addr, secure, client.Config{})
}

// open opens an export, with TLS or without.
func (w *world) open(p *process, name string, secure bool) (*client.Conn, error) {
	return w.Open("tcp", p.addr, name, secure, client.Config{})
}

// openAs opens an export with metadata contexts, perhaps as a client that knows simple
// replies only.
func (w *world) openAs(p *process, secure, simple bool, name string, contexts ...string) *client.Conn {
	w.t.Helper()
	conn, err := w.Open("tcp", p.addr, name, secure, client.Config{NoStructured: simple, MetaContexts: contexts})
	if err != nil {
		w.t.Fatal(err)
	}
	return conn
}

// mustOpen opens an export of a VDI in the clear, and closes it at the end of the test.
func (w *world) mustOpen(p *process, vdi string) *client.Conn {
	w.t.Helper()
	conn, err := w.open(p, w.export(vdi), false)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { conn.Close() })
	return conn
}

// exportName opens an export with NBD_OPT_EXPORT_NAME and returns the connection and the bytes
// that arrived in one segment.
func (w *world) exportName(p *process, name string) (net.Conn, []byte) {
	w.t.Helper()
	c, err := net.Dial("tcp", p.addr)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		w.t.Fatal(err)
	}
	greeting := make([]byte, 18)
	if _, err := bufio.NewReaderSize(c, 18).Read(greeting); err != nil {
		w.t.Fatal(err)
	}
	msg := []byte{0, 0, 0, 1} // fixed newstyle, zeroes wanted
	msg = append(msg, "IHAVEOPT\x00\x00\x00\x01"...)
	msg = append(msg, 0, 0, byte(len(name)>>8), byte(len(name)))
	if _, err := c.Write(append(msg, name...)); err != nil {
		w.t.Fatal(err)
	}
	answer := make([]byte, 4096)
	n, _ := c.Read(answer)
	return c, answer[:n]
}
