package service

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"
)

// An upgrade replaces the running process by one of the installed program. The old process
// starts the new one with copies of its listeners and of its locks, and two pipes:
//
//	old process                           new process
//	starts the new one                    opens everything, asks xapi
//	                                ◄──   "ready", a message
//	gives its control socket another
//	name
//	orders it to serve              ──►   takes the control socket's name, accepts
//	                                ◄──   "serving", a message
//	tells systemd the new main process
//	orders it to take charge        ──►   metrics, watchdog, recovery
//	stops accepting, gives up the locks
//
// If the new process is not serving in time, or ends before that, the old one kills it and
// goes on. Both accept for a moment, and none of them never. The new process keeps the pipe
// of orders open, and so notices the end of the old one.
//
// If the old process is asked to stop before it orders the new one to serve, it kills the new
// one. From then on it completes the upgrade, and then orders the new process to stop, too:
// see passOn.

// handoverEnv is the environment variable with the handover, as JSON.
const handoverEnv = "XAPI_NBD_HANDOVER"

// firstPassed is the descriptor of the first file that is passed.
const firstPassed = 3

// handover names the descriptors that the new process inherits.
type handover struct {
	Messages     int              `json:"messages"`              // to be written
	Orders       int              `json:"orders"`                // to be read
	Generation   int              `json:"generation"`            // of the old process
	Certificate  bool             `json:"certificate,omitempty"` // the old process has a usable one
	State        int              `json:"state"`                 // the lock of the state folder
	Host         int              `json:"host,omitempty"`
	Installation string           `json:"installation,omitempty"`
	Listeners    []passedListener `json:"listeners"`
	Systemd      bool             `json:"systemd,omitempty"` // systemd has made the listeners
	files        []*os.File       // those that the numbers stand for, in the old process
}

// passedListener is a listener that is passed.
type passedListener struct {
	FD   int    `json:"fd"`
	Addr string `json:"addr"` // as it is configured
}

// pass adds a file and returns its descriptor in the new process.
func (h *handover) pass(f *os.File) int {
	h.files = append(h.files, f)
	return firstPassed + len(h.files) - 1
}

func (h *handover) close() {
	for _, f := range h.files {
		f.Close()
	}
}

// message is one line on the pipe of messages.
type message struct {
	PID     int    `json:"pid,omitempty"`     // the new process was started
	Ready   bool   `json:"ready,omitempty"`   // it has opened everything
	Version string `json:"version,omitempty"` // with Ready
	Serving bool   `json:"serving,omitempty"` // it accepts
	Error   string `json:"error,omitempty"`   // it ends
}

// send writes a message. A pipe takes it at once; if nobody reads it the other process has
// ended.
func send(w io.Writer, m message) error {
	line, err := json.Marshal(m)
	if err != nil {
		return err
	}
	_, err = w.Write(append(line, '\n'))
	return err
}

// program is the path of the running program. After an upgrade of the package it is that of
// the new one.
var program, errProgram = os.Executable()

// startArg is the first argument of the process that starts the new one, see Start.
const startArg = "start-new-process"

// IsStart reports whether this process is to call Start only. args are those of the process.
func IsStart(args []string) bool { return len(args) > 2 && args[1] == startArg }

// Start starts the program and arguments in args[2:], sends its process ID on the pipe of
// messages and returns the exit code. systemd supervises only its own children as the main
// process: when this process ends, the new one is its child. It is not run by a fork alone
// because Go programs cannot.
func Start(args []string) int {
	h, err := readHandover()
	if err != nil {
		return 1
	}
	messages := os.NewFile(uintptr(h.Messages), "messages")
	files := []*os.File{os.Stdin, os.Stdout, os.Stderr}
	for fd := firstPassed; fd < firstPassed+h.count(); fd++ {
		files = append(files, os.NewFile(uintptr(fd), "passed"))
	}
	p, err := os.StartProcess(args[2], args[2:], &os.ProcAttr{Env: os.Environ(), Files: files})
	if err != nil {
		_ = send(messages, message{Error: err.Error()})
		return 1
	}
	if send(messages, message{PID: p.Pid}) != nil {
		return 1
	}
	return 0
}

// count returns the number of files that were passed.
func (h *handover) count() int {
	n := 3
	if h.Host > 0 {
		n++
	}
	return n + len(h.Listeners)
}

// readHandover reads handoverEnv. It returns nil without one.
func readHandover() (*handover, error) {
	text := os.Getenv(handoverEnv)
	if text == "" {
		return nil, nil
	}
	h := new(handover)
	if err := json.Unmarshal([]byte(text), h); err != nil {
		return nil, fmt.Errorf("%s: %w", handoverEnv, err)
	}
	return h, nil
}

// newProcess is the new process, as the old one sees it.
type newProcess struct {
	starter  *exec.Cmd
	messages *bufio.Reader
	pipe     *os.File // of messages
	orders   *os.File
	pid      int // 0 until it was started
}

// startNew starts the installed program with the arguments of this process.
func startNew(h *handover) (p *newProcess, err error) {
	if errProgram != nil {
		return nil, errProgram
	}
	messages, toOld, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	fromOld, orders, err := os.Pipe()
	if err != nil {
		messages.Close()
		toOld.Close()
		return nil, err
	}
	h.Messages, h.Orders = h.pass(toOld), h.pass(fromOld)
	p = &newProcess{messages: bufio.NewReader(messages), pipe: messages, orders: orders}
	text, err := json.Marshal(h)
	if err == nil {
		// This process's own program, also if its file was replaced: it knows how to start
		// the other one, whatever that is.
		p.starter = exec.Command("/proc/self/exe", append([]string{startArg, program}, os.Args[1:]...)...)
		p.starter.Args[0] = os.Args[0]
		p.starter.Env = append(slices.DeleteFunc(os.Environ(), isOfOneProcess), handoverEnv+"="+string(text))
		p.starter.Stdout, p.starter.Stderr = os.Stdout, os.Stderr
		p.starter.ExtraFiles = h.files
		err = p.starter.Start()
	}
	if err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// isOfOneProcess reports whether a variable of the environment is meant for this process
// only.
func isOfOneProcess(variable string) bool {
	name, _, _ := strings.Cut(variable, "=")
	return slices.Contains([]string{handoverEnv, "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID"}, name)
}

// starterTimeout is how long the process that starts the new one may take to end, after
// which it is killed. It ends as soon as it has sent the ID of the new one.
const starterTimeout = time.Second

// waitReady waits until the new process is ready and returns its version. The message with
// its ID, which another process sends, may come later than its own.
func (p *newProcess) waitReady(ctx context.Context) (version string, err error) {
	defer p.endStarter()
	for ready := false; !ready || p.pid == 0; {
		m, err := p.receive(ctx)
		switch {
		case err != nil:
			return "", err
		case m.Error != "":
			return "", errors.New(m.Error)
		case m.PID != 0:
			p.pid = m.PID
		case m.Ready:
			ready, version = true, m.Version
		}
	}
	return version, nil
}

// endStarter waits for the end of the process that starts the new one.
func (p *newProcess) endStarter() {
	defer time.AfterFunc(starterTimeout, func() { _ = p.starter.Process.Kill() }).Stop()
	_ = p.starter.Wait() // the messages say how it went
}

// errEnded is the error of receive after the end of the new process.
var errEnded = errors.New("the new process has ended")

// receive returns the next message. It returns the cause of ctx if that ends first.
func (p *newProcess) receive(ctx context.Context) (m message, err error) {
	defer context.AfterFunc(ctx, func() { _ = p.pipe.SetReadDeadline(time.Now()) })()
	line, err := p.messages.ReadBytes('\n')
	switch {
	case ctx.Err() != nil:
		return m, context.Cause(ctx)
	case errors.Is(err, io.EOF):
		return m, errEnded
	case err != nil:
		return m, err
	}
	if err := json.Unmarshal(line, &m); err != nil {
		return m, fmt.Errorf("message of the new process: %w", err)
	}
	return m, nil
}

// waitServing waits until the new process serves.
func (p *newProcess) waitServing(ctx context.Context) error {
	for {
		m, err := p.receive(ctx)
		switch {
		case err != nil:
			return err
		case m.Error != "":
			return errors.New(m.Error)
		case m.Serving:
			return nil
		}
	}
}

// The orders to the new process, in their order.
const (
	orderServe  = 's' // take the control socket's name and accept
	orderCharge = 'c' // this process is the main one now
	orderReload = 'r' // reload the settings; any time after that, as the following one
	orderStop   = 't' // stop: the old process was asked to stop while it handed over
)

// order sends an order. It fails if the new process has ended.
func (p *newProcess) order(what byte) error {
	_, err := p.orders.Write([]byte{what})
	return err
}

// deathNotice is how long a process that has been seen alive may take to be noticed as dead.
const deathNotice = 10 * time.Millisecond

// kill ends a new process that is not to serve. It has not ended as long as the pipe of
// messages is open, so its ID is not that of another process.
func (p *newProcess) kill() {
	_ = p.pipe.SetReadDeadline(time.Now().Add(deathNotice))
	for {
		line, err := p.messages.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return // it has ended
		}
		if err != nil {
			break
		}
		var m message
		if json.Unmarshal(line, &m) == nil && m.PID != 0 {
			p.pid = m.PID // nobody has waited for it so far
		}
	}
	if p.pid != 0 {
		_ = syscall.Kill(p.pid, syscall.SIGKILL)
	}
}

// close closes the pipes. Until then the new process takes the old one for alive.
func (p *newProcess) close() {
	p.pipe.Close()
	p.orders.Close()
}
