package main

import (
	"os"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"xapi-nbd/xapi/xapitest"
)

// crashEnv makes a child panic as soon as it can read from descriptor 3.
const crashEnv = "XAPI_NBD_TEST_CRASH"

func panicWhenAsked() {
	var b [1]byte
	if n, _ := os.NewFile(3, "order to panic").Read(b[:]); n == 1 {
		panic("asked to")
	}
}

// TestCrashesEndBySignal: a crash ends the process by a signal. Go's exit status 2 would be
// that of a usage error, after which systemd does not start the service again. No core dump
// is written, as the memory holds sessions.
func TestCrashesEndBySignal(t *testing.T) {
	var core unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &core); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{Cur: core.Max, Max: core.Max}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Setrlimit(unix.RLIMIT_CORE, &core) })
	for _, tt := range []struct {
		name  string
		crash func(p *process, order *os.File) error
		text  string
	}{
		{"panic", func(_ *process, order *os.File) error {
			_, err := order.Write([]byte{1})
			return err
		}, "panic: asked to"},
		{"watchdog", func(p *process, _ *os.File) error { return p.cmd.Process.Signal(syscall.SIGABRT) }, "SIGABRT"},
		{"fault", func(p *process, _ *os.File) error { return p.cmd.Process.Signal(syscall.SIGSEGV) }, "SIGSEGV"},
		{"SIGQUIT", func(p *process, _ *os.File) error { return p.cmd.Process.Signal(syscall.SIGQUIT) }, "SIGQUIT"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, xapitest.Config{})
			read, order, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer read.Close()
			defer order.Close()
			w.childFiles = []*os.File{read}
			t.Setenv(crashEnv, "1")
			p := w.start()
			if err := tt.crash(p, order); err != nil {
				t.Fatal(err)
			}
			p.exitCode(patience, tt.name)
			status := p.cmd.ProcessState.Sys().(syscall.WaitStatus)
			if !status.Signaled() || status.Signal() != syscall.SIGABRT || status.CoreDump() {
				t.Errorf("got %v, want the end by SIGABRT without a core", p.cmd.ProcessState)
			}
			if !strings.Contains(p.output(), tt.text) || !strings.Contains(p.output(), "goroutine ") {
				t.Errorf("the output does not say %q and where:\n%s", tt.text, p.output())
			}
		})
	}
}
