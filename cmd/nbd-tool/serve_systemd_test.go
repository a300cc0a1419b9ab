package main

import (
	"bufio"
	"bytes"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// listenPIDEnv makes the test program set LISTEN_PID, as its ID is known only when it runs.
const listenPIDEnv = "NBD_TOOL_TEST_LISTEN_PID"

// startWithSocket starts nbd-tool serve in a process of its own, to which f is passed as
// systemd passes sockets.
func startWithSocket(t *testing.T, f *os.File, args ...string) (cmd *exec.Cmd, out *bufio.Reader, errOut *bytes.Buffer) {
	t.Helper()
	cmd = exec.Command(os.Args[0], append([]string{"serve"}, args...)...)
	cmd.Env = append(os.Environ(), toolEnv+"=1", listenPIDEnv+"=1", "LISTEN_FDS=1")
	cmd.ExtraFiles = []*os.File{f}
	errOut = new(bytes.Buffer)
	cmd.Stderr = errOut
	pipe, err := cmd.StdoutPipe()
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
	return cmd, bufio.NewReader(pipe), errOut
}

// TestServeSocketActivation: a socket that systemd passes replaces the addresses of the flags
// and of the file, also after SIGHUP.
func TestServeSocketActivation(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	dir := serveFolder(t)
	config := dir + "/exports.toml"
	write := func(name string) {
		text := "listen = ['192.0.2.1:1']\n[[export]]\nname = '" + name + "'\npath = '" + dir + "/a.img'\n"
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, args := range [][]string{{"--listen=192.0.2.1:1", "--export=a", dir + "/a.img"}, {"--config", config}} {
		write("a")
		cmd, out, errOut := startWithSocket(t, f, args...)
		if line, err := out.ReadString('\n'); line != "listening on "+l.Addr().String()+"\n" {
			t.Fatalf("%q: got %q, %v, error output %s", args, line, err, errOut)
		}
		uri := "nbd://" + l.Addr().String() + "/"
		if got := succeed(t, "size", uri+"a"); got != "512\n" {
			t.Errorf("%q: got %q", args, got)
		}
		if args[0] == "--config" {
			write("b")
			if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
				t.Fatal(err)
			}
			for tool(t, "size", uri+"b").code != exitOK { // until it is reloaded
				if tool(t, "size", uri+"a").code != exitOK && tool(t, "size", uri+"b").code != exitOK {
					t.Fatalf("neither the old export nor the new one")
				}
			}
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		if text := errOut.String(); strings.Contains(text, "192.0.2.1") {
			t.Errorf("%q: it tried its own address: %s", args, text)
		}
	}
}

// TestServeSocketActivationRefused: a descriptor that is no listening socket is an error.
func TestServeSocketActivationRefused(t *testing.T) {
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd, _, errOut := startWithSocket(t, f, writeFile(t, "disk", make([]byte, 512)))
	if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != exitFailed || !strings.Contains(errOut.String(), "descriptor 3 that systemd passed") {
		t.Errorf("%v, error output %q", err, errOut)
	}
}
