package main

import (
	"context"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"xapi-nbd/nbd/wire"
	"xapi-nbd/test/requires"
	"xapi-nbd/xapi/xapitest"
)

// transfer is a copy that is stuck half way, because nobody takes what nbdcopy
// writes.
type transfer struct {
	cmd *exec.Cmd
	out io.ReadCloser
}

// startTransfer returns when data flows.
func (w *world) startTransfer(p *process, vdi string) *transfer {
	w.t.Helper()
	cmd := exec.Command(requires.Tool(w.t, "nbdcopy"), w.uri(p, w.export(vdi), false), "-")
	out, err := cmd.StdoutPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	tr := &transfer{cmd: cmd, out: out}
	w.t.Cleanup(tr.kill)
	if _, err := io.ReadFull(out, make([]byte, 64<<10)); err != nil {
		w.t.Fatal(err)
	}
	if n := len(w.host.VBDs()); n != 1 {
		w.t.Fatalf("VBDs in mid-transfer: got %d, want 1", n)
	}
	return tr
}

func (tr *transfer) kill() {
	_ = tr.cmd.Process.Kill()
	_ = tr.cmd.Wait()
}

// diskSize is more than pipes and socket buffers hold.
const diskSize = 64 << 20

func TestKillClientInMidTransfer(t *testing.T) {
	w, vdi := loopWorld(t)
	p := w.start()
	w.startTransfer(p, vdi).kill()
	w.waitClean(p)
}

func TestStopInMidTransfer(t *testing.T) {
	w, vdi := loopWorld(t)
	p := w.start()
	w.startTransfer(p, vdi)
	// stop_timeout is 10 s; the contract counts from the signal.
	if code := p.stop(10 * time.Second); code != 0 {
		t.Errorf("exit code: got %d, want 0", code)
	}
	w.waitClean(p)
}

func TestKillServiceInMidTransfer(t *testing.T) {
	w, vdi := loopWorld(t)
	p := w.start()
	w.startTransfer(p, vdi)
	p.kill()
	if n := len(w.host.VBDs()); n != 1 {
		t.Fatalf("VBDs after the kill: got %d, want 1: nothing was left to recover", n)
	}
	if w.journal() == "" {
		t.Error("the journal does not know the VBD")
	}
	p = w.start()
	w.waitClean(p)
	conn := w.mustOpen(p, vdi)
	conn.Close()
	w.waitClean(p)
}

// loopWorld has a disk on a loop device if that is possible, else on a file.
func loopWorld(t *testing.T) (*world, string) {
	t.Helper()
	requires.Tool(t, "nbdcopy")
	requires.LoopDevices(t)
	w := newWorld(t, xapitest.Config{Loop: true})
	return w, w.addVDI(random(3, diskSize), xapitest.VDISpec{})
}

// With xapi gone a stop ends in time all the same, says by its exit code that
// something is left, and the next start removes it.
func TestStopWithoutXapi(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	p := w.start("--config=" + w.file("stop.toml", `stop_timeout = "1s"`))
	w.mustOpen(p, vdi)
	w.host.Stop()
	if code := p.stop(patience); code != exitLeft {
		t.Errorf("exit code: got %d, want %d", code, exitLeft)
	}
	if err := w.host.Resume(); err != nil {
		t.Fatal(err)
	}
	w.waitClean(w.start())
}

// Restarting xapi ends every session but no transfer.
func TestXapiRestartsInMidTransfer(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	p := w.start()
	conn := w.mustOpen(p, vdi)
	w.host.Restart()
	if _, err := conn.ReadAt(make([]byte, 1<<20), 0); err != nil {
		t.Errorf("after the restart: %v", err)
	}
	conn.Close()
	w.waitClean(p)
}

// The second signal skips the draining, not the detaching.
func TestSecondSignalHurries(t *testing.T) {
	w, vdi := loopWorld(t)
	p := w.start("--config=" + w.file("slow.toml", `stop_timeout = "1h"`))
	// A reply that is longer than the sockets' buffers, and nobody takes it: that
	// drains only when the peer's minute is over, and says something else then.
	conn, _ := w.exportName(p, w.export(vdi))
	read := wire.Request{Command: wire.CmdRead, Length: wire.DefaultMaxPayload}
	if _, err := conn.Write(read.Append(nil)); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() string {
		for _, c := range w.report().Connections {
			if c.InFlight > 0 {
				return ""
			}
		}
		return "nothing is in flight"
	})
	if err := p.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	p.waitLine("stopping")
	if code := p.stop(patience); code != 0 {
		t.Errorf("exit code: got %d, want 0", code)
	}
	if !strings.Contains(p.output(), "connections were cut off") {
		t.Errorf("it waited for the reply, or had none to wait for:\n%s", p.output())
	}
	w.waitClean(p)
}

// file writes a file into the world.
func (w *world) file(name, text string) string {
	w.t.Helper()
	path := filepath.Join(w.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
	return path
}

// waitCalls waits until the host has seen n calls of a method.
func (w *world) waitCalls(method string, n int) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	err := w.host.Wait(ctx, func([]xapitest.VBD) bool {
		seen := 0
		for _, c := range w.host.Calls() {
			if c.Method == method {
				seen++
			}
		}
		return seen >= n
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

// asyncExportName is exportName for a server that takes its time. The channel
// closes when the connection has ended.
func (w *world) asyncExportName(p *process, name string) (net.Conn, <-chan struct{}) {
	w.t.Helper()
	c, err := net.Dial("tcp", p.addr)
	if err != nil {
		w.t.Fatal(err)
	}
	msg := append([]byte{0, 0, 0, 1}, "IHAVEOPT\x00\x00\x00\x01"...)
	msg = append(msg, 0, 0, byte(len(name)>>8), byte(len(name)))
	if _, err := c.Write(append(msg, name...)); err != nil {
		w.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(io.Discard, c)
	}()
	return c, done
}
