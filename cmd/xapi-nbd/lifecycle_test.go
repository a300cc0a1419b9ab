package main

import (
	"os"
	"strings"
	"testing"
	"time"

	"xapi-nbd/nbd/wire"
	"xapi-nbd/test/requires"
	"xapi-nbd/xapi/xapitest"
)

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

// TestStopWithoutXapi: without xapi a stop also ends in time, with the exit code for
// leftovers, and the next start removes them.
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

// TestXapiRestartsInMidTransfer: a restart of xapi ends every session but no transfer.
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

// TestSecondSignalSkipsTheDraining: the second signal skips the waiting for clients, not the detaching.
func TestSecondSignalSkipsTheDraining(t *testing.T) {
	w, vdi := loopWorld(t)
	p := w.start("--config=" + w.file("slow.toml", `stop_timeout = "1h"`))
	// A reply that is longer than the sockets' buffers and is not read. Without the second
	// signal the connection would end only after the write timeout, with another text.
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
