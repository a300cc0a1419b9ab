package interop

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// timeout bounds every wait of these tests.
const timeout = 2 * time.Minute

// eventually calls done until it succeeds. After a timeout it fails the test with the last
// result.
func eventually(t *testing.T, done func() (ok bool, otherwise string)) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(timeout)
	for {
		ok, otherwise := done()
		if ok {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("after %v still: %s", timeout, otherwise)
		}
	}
}

// service is a running xapi-nbd.
type service struct {
	t      *testing.T
	cmd    *exec.Cmd
	addr   string        // host:port
	ended  chan struct{} // closed when it has exited
	killed bool          // by kill

	mu   sync.Mutex // guards text
	text strings.Builder
}

var listening = regexp.MustCompile(`listening on ([^\s",]+)`)

// startService runs the program until the end of the test, when it must stop without errors.
// It returns when the service listens and has reached xapi.
func startService(t *testing.T, args ...string) *service {
	t.Helper()
	path, err := program()
	if err != nil {
		t.Fatal(err)
	}
	s := &service{t: t, cmd: exec.Command(path, args...), ended: make(chan struct{})}
	stderr, err := s.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { // ends with the process
		defer close(s.ended)
		for scanner := bufio.NewScanner(stderr); scanner.Scan(); {
			s.mu.Lock()
			s.text.WriteString(scanner.Text() + "\n")
			s.mu.Unlock()
		}
		_ = s.cmd.Wait()
	}()
	t.Cleanup(s.stop)
	eventually(t, func() (bool, string) {
		log := s.log()
		select {
		case <-s.ended:
			t.Fatalf("the service ended:\n%s", log)
		default:
		}
		if found := listening.FindStringSubmatch(log); found != nil {
			s.addr = found[1]
		}
		return s.addr != "" && strings.Contains(log, "ready to serve"), "not ready:\n" + log
	})
	return s
}

// kill ends the service like a crash.
func (s *service) kill() {
	s.killed = true
	_ = s.cmd.Process.Kill()
	<-s.ended
}

// stop ends the service with SIGTERM, unless it has been killed, and kills it after a timeout.
func (s *service) stop() {
	if s.killed {
		return
	}
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.ended:
	case <-time.After(timeout):
		_ = s.cmd.Process.Kill()
		<-s.ended
		s.t.Errorf("the service did not stop within %v", timeout)
	}
	if code := s.cmd.ProcessState.ExitCode(); code != 0 {
		s.t.Errorf("exit code of the service: got %d, want 0", code)
	}
}

func (s *service) log() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}

// open lists the service's descriptors whose target has the prefix.
func (s *service) open(prefix string) (targets []string) {
	s.t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", s.cmd.Process.Pid)
	fds, err := os.ReadDir(dir)
	if err != nil {
		s.t.Fatalf("the open files of the service: %v\n%s", err, s.log())
	}
	for _, fd := range fds {
		target, err := os.Readlink(filepath.Join(dir, fd.Name()))
		if err == nil && strings.HasPrefix(target, prefix) { // else it was closed meanwhile
			targets = append(targets, target)
		}
	}
	return targets
}
