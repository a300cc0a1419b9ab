package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"xapi-nbd/cmd/xapi-nbd/internal/control"
	"xapi-nbd/xapi/xapitest"
)

func TestPrintWithin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		read, write := io.Pipe()
		begin := time.Now()
		printWithin(time.Second, write, "text") // nobody reads
		if waited := time.Since(begin); waited != time.Second {
			t.Errorf("waited %v, want 1 s", waited)
		}
		read.Close()
	})
}

// TestBlockedLogDelaysNothing: a log whose reader has stopped delays nothing: disks are served, status
// answers, and SIGTERM ends the service, in time. Its lines are in order when they are read at
// last.
func TestBlockedLogDelaysNothing(t *testing.T) {
	for _, taken := range []bool{false, true} {
		t.Run(fmt.Sprintf("taken at last %v", taken), func(t *testing.T) {
			w := newWorld(t, xapitest.Config{})
			vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
			read, write := fullPipe(t)
			defer read.Close()
			p := &process{t: t, ended: make(chan struct{})}
			socket := "unix:" + filepath.Join(w.dir, "nbd.sock")
			p.cmd = exec.Command(os.Args[0], w.args("--listen="+socket)...)
			p.cmd.Env = append(os.Environ(), childEnv+"=1")
			p.cmd.Stderr = write
			if err := p.cmd.Start(); err != nil {
				t.Fatal(err)
			}
			write.Close()
			go func() {
				_ = p.cmd.Wait()
				close(p.ended)
			}()
			defer func() {
				_ = p.cmd.Process.Kill()
				<-p.ended
			}()
			eventually(t, func() string {
				conn, err := w.openUnix(socket, w.export(vdi))
				if err != nil {
					return err.Error()
				}
				conn.Close()
				return ""
			})
			if got := w.report().State; got != control.StateServing {
				t.Errorf("status: got %q", got)
			}
			w.waitClean(nil)
			var log chan string
			if taken {
				log = make(chan string)
				go func() {
					text, _ := io.ReadAll(read)
					log <- string(text)
				}()
			}
			begin := time.Now()
			if code := p.stop(patience); code != 0 {
				t.Errorf("exit code: got %d, want 0", code)
			}
			if took := time.Since(begin); took > 15*time.Second {
				t.Errorf("the stop took %v", took)
			}
			if !taken {
				return
			}
			text := <-log
			last := 0
			for _, line := range []string{"listening on ", "ready to serve", "VBD plugged", "VBD unplugged", "msg=stopping", "msg=stopped"} {
				at := strings.Index(text, line)
				if at < last {
					t.Errorf("%q is missing, or before its time:\n%s", line, strings.TrimLeft(text, "x"))
				}
				last = at
			}
		})
	}
}

// fullPipe returns a pipe whose buffer is full.
func fullPipe(t *testing.T) (read, write *os.File) {
	t.Helper()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	size, err := unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, 4096)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := syscall.Write(fds[1], bytes.Repeat([]byte("x"), size)); n != size {
		t.Fatalf("filled %d of %d bytes: %v", n, size, err)
	}
	return os.NewFile(uintptr(fds[0]), "pipe"), os.NewFile(uintptr(fds[1]), "pipe")
}
