package main

import (
	"fmt"
	"strings"
	"syscall"
	"testing"

	"xapi-nbd/cmd/xapi-nbd/internal/control"
	"xapi-nbd/nbd/client"
)

// orphaned makes processes that were replaced, each with a transfer, and kills the one that
// has replaced them, as a crash of it would. It returns their connections, the oldest first.
func orphaned(t *testing.T, processes int) (*upgradeWorld, []*client.Conn) {
	t.Helper()
	w := newUpgradeWorld(t, 64<<10)
	var conns []*client.Conn
	var last control.UpgradeReport
	for range processes {
		conn := w.mustOpen(w.p, w.vdi)
		if _, err := conn.ReadAt(make([]byte, 512), 0); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
		last = w.upgrade()
	}
	if err := syscall.Kill(last.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	w.wait(last.PID)
	return w, conns
}

// TestStatusOfReplacedProcesses: status shows them, and --disconnect reaches them, also when
// no process serves new clients.
func TestStatusOfReplacedProcesses(t *testing.T) {
	w, conns := orphaned(t, 2)
	code, out, errOut := w.status()
	wantScreenWidth(t, out)
	if code != 1 || errOut != "xapi-nbd: no running service was found\n" || lacking(out, []string{
		"xapi-nbd ", control.StateNoAnswer + "\n", fmt.Sprintf("process %d, version", w.p.cmd.Process.Pid),
		"replaced by an upgrade", "1/1 ", "2/1 ", w.vdi,
	}) != "" {
		t.Errorf("status: got exit code %d, %q\n%s", code, errOut, out)
	}
	if code, out, _ := w.status("--json"); code != 1 || !strings.Contains(out, `"state": "`+control.StateNoAnswer+`"`) {
		t.Errorf("status --json: got exit code %d\n%s", code, out)
	}
	if code, out, errOut := w.status("--drain"); code != 1 || !strings.Contains(errOut, "those that were replaced (2) end with their last connection") {
		t.Errorf("--drain: got exit code %d, %q, %q", code, out, errOut)
	}
	if code, out, errOut := w.status("--disconnect=2/1"); code != 0 || out != "Connection 2/1 was closed.\n" {
		t.Errorf("--disconnect: got exit code %d, %q, %q", code, out, errOut)
	}
	if _, err := conns[1].ReadAt(make([]byte, 512), 0); err == nil {
		t.Error("the connection is still served")
	}
	w.waitProcesses(w.p.cmd.Process.Pid)
	if _, err := conns[0].ReadAt(make([]byte, 512), 0); err != nil {
		t.Errorf("the other connection: %v", err)
	}
	if code, out, errOut := w.status("--disconnect=" + w.vdi); code != 0 || !strings.Contains(out, "were closed: 1.") {
		t.Errorf("--disconnect of the VDI: got exit code %d, %q, %q", code, out, errOut)
	}
	w.waitProcesses()
	if code, _, _ := w.status(); code != 1 {
		t.Errorf("without any process: got exit code %d, want 1", code)
	}
	w.waitClean(nil)
}

// TestEndReplaced: --end-replaced ends the processes that were replaced and no other one,
// with and without a process that serves new clients.
func TestEndReplaced(t *testing.T) {
	w, conns := orphaned(t, 2)
	endReplaced := func(want int) {
		t.Helper()
		text := fmt.Sprintf("Processes that were replaced and have been ended: %d.\n", want)
		if code, out, errOut := w.status("--end-replaced"); code != 0 || out != text {
			t.Errorf("--end-replaced: got exit code %d, %q, %q, want %q", code, out, errOut, text)
		}
	}
	endReplaced(2)
	w.waitProcesses()
	for _, conn := range conns {
		if _, err := conn.ReadAt(make([]byte, 512), 0); err == nil {
			t.Error("a connection of a process that was ended is served")
		}
	}
	w.waitClean(nil)
	endReplaced(0)

	w.p = w.start()
	t.Cleanup(w.killAll) // before the end of its output is waited for
	conn := w.mustOpen(w.p, w.vdi)
	if _, err := conn.ReadAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	last := w.upgrade()
	endReplaced(1)
	w.waitProcesses(last.PID)
	if _, err := conn.ReadAt(make([]byte, 512), 0); err == nil {
		t.Error("a connection of the process that was ended is served")
	}
	w.readsAsNewClient(w.p, w.vdi)
	w.stopAll(last.PID)
}
