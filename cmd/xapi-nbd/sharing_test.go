package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"xapi-nbd/nbd/wire"
	"xapi-nbd/test/requires"
	"xapi-nbd/xapi/xapitest"
)

// abandon ends a connection without NBD_CMD_DISC, as a client does that crashes.
func (w *world) abandon(p *process, vdi string) {
	w.t.Helper()
	conn, answer := w.exportName(p, w.export(vdi))
	if len(answer) == 0 {
		w.t.Fatal("the export was refused")
	}
	conn.Close()
}

// TestSessionEndsInMidTransfer: the logout of a session ends its connections and no others,
// for which the VBD stays.
func TestSessionEndsInMidTransfer(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	p := w.start("--config=" + w.file("recheck.toml", `session_recheck = "10ms"`))
	mine, theirs := w.session(xapitest.RoleVMAdmin), w.session(xapitest.RoleVMAdmin)
	conn, err := w.open(p, w.host.ExportName(vdi, mine), false)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	other, err := w.open(p, w.host.ExportName(vdi, theirs), false)
	if err != nil {
		t.Fatal(err)
	}
	w.host.ExpireSession(mine)
	for err == nil {
		_, err = conn.ReadAt(make([]byte, 4096), 0)
	}
	p.waitLine("session rejected by xapi (SESSION_INVALID)")
	if _, err := other.ReadAt(make([]byte, 4096), 0); err != nil {
		t.Errorf("the other session's connection: %v", err)
	}
	if n := len(w.host.VBDs()); n != 1 {
		t.Errorf("VBDs: got %d, want the one that is in use", n)
	}
	other.Close()
	w.waitClean(p)
}

// TestXapiRestartsInMidCopy: a restart of xapi ends all sessions, and no transfer, no matter
// how often sessions are rechecked.
func TestXapiRestartsInMidCopy(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	content := random(1, 1<<20)
	vdi := w.addVDI(content, xapitest.VDISpec{})
	p := w.start("--config=" + w.file("recheck.toml", `session_recheck = "1ms"`))
	conn, err := w.open(p, w.export(vdi), false)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(content))
	half := len(got) / 2
	if _, err := conn.ReadAt(got[:half], 0); err != nil {
		t.Fatal(err)
	}
	w.host.Restart()
	p.waitLine("its connections go on")
	if _, err := conn.ReadAt(got[half:], int64(half)); err != nil {
		t.Errorf("after the restart: %v", err)
	}
	if !bytes.Equal(got, content) {
		t.Error("the copy differs")
	}
	conn.Close()
	w.waitClean(p)
}

// TestReconnectFindsTheVDIPlugged: a client that reconnects within linger gets the VBD of its
// lost connection.
func TestReconnectFindsTheVDIPlugged(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	p := w.start("--config=" + w.file("linger.toml", `linger = "1h"`))
	w.abandon(p, vdi)
	p.waitLine("waiting for the client to come back")
	conn, err := w.open(p, w.export(vdi), false)
	if err != nil {
		t.Fatal(err)
	}
	if n := w.count("VBD.create"); n != 1 {
		t.Errorf("VBD.create: got %d calls, want 1", n)
	}
	conn.Close() // with NBD_CMD_DISC
	w.waitClean(p)
}

func (w *world) count(method string) int {
	n := 0
	for _, c := range w.host.Calls() {
		if c.Method == method {
			n++
		}
	}
	return n
}

// TestDataDestroyRightAfterDisc: backup tools destroy the data of a snapshot right after they
// have read it, and xapi waits four seconds for its VBDs to be unplugged. The storage manager
// takes one of them here, and the service may take another one. A machine that was busy for a
// second gets another attempt: a pause of the service would occur in each.
func TestDataDestroyRightAfterDisc(t *testing.T) {
	w := newWorld(t, xapitest.Config{DataDestroyWait: patience})
	p := w.start()
	w.host.Delay("VBD.unplug", time.Second)
	quickest := time.Hour
	for try := 0; try < 5 && quickest >= 2*time.Second; try++ {
		vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
		conn, err := w.open(p, w.export(vdi), false)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		begin := time.Now()
		if err := w.host.DataDestroy(t.Context(), vdi); err != nil {
			t.Fatal(err)
		}
		quickest = min(quickest, time.Since(begin))
		w.waitClean(p)
	}
	if quickest >= 2*time.Second {
		t.Errorf("VDI.data_destroy took %v at best, want less than 2s", quickest)
	}
}

// TestCallCounts counts the calls to xapi of a connection and of refusals.
func TestCallCounts(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	p := w.start()
	p.waitCalm(w)
	dead := w.session(xapitest.RoleVMAdmin)
	w.host.ExpireSession(dead)
	for _, tt := range []struct {
		name    string
		export  string
		refused string
		most    int
	}{
		{"first connection", w.export(vdi), "", 10}, // one of them once for each SR
		{"further connection", w.export(vdi), "", 3},
		{"rejected session", w.host.ExportName(vdi, dead), "session rejected", 2}, // 1 about the networks
		{"rejected session again", w.host.ExportName(vdi, dead), "session rejected", 1},
		{"role that may not plug", w.host.ExportName(vdi, w.session(xapitest.RoleReadOnly)), "missing permission", 2},
		{"no session", "/" + vdi, "session_id", 1},
	} {
		w.host.ResetCalls()
		conn, err := w.open(p, tt.export, false)
		switch {
		case tt.refused == "" && err != nil:
			t.Fatal(err)
		case tt.refused == "":
			defer conn.Close()
		case err == nil || !strings.Contains(err.Error(), tt.refused):
			t.Errorf("%s: got %v, want %q", tt.name, err, tt.refused)
		}
		var calls []string
		for _, c := range w.host.Calls() {
			if c.Method != "VBD.plug" {
				calls = append(calls, c.Method)
			}
		}
		t.Logf("%s: %d calls besides VBD.plug: %v", tt.name, len(calls), calls)
		if len(calls) > tt.most {
			t.Errorf("%s: got %d calls besides VBD.plug, want at most %d: %v", tt.name, len(calls), tt.most, calls)
		}
	}
}

// waitCalm waits until the recovery at the start is over.
func (p *process) waitCalm(w *world) {
	p.t.Helper()
	w.waitCalls("session.logout", 1)
}

// TestHangingPlugDelaysNoOther: a plug that hangs delays neither connections that read nor
// new ones to attached VDIs. Connections to the VDI that is being plugged share one plug.
func TestHangingPlugDelaysNoOther(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi, stuck := w.addVDI(random(1, 1<<20), xapitest.VDISpec{}), w.addVDI(random(2, 1<<20), xapitest.VDISpec{})
	p := w.start("--max-vbds=2")
	conn, err := w.open(p, w.export(vdi), false)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	release := w.host.Block("VBD.plug")
	var waiting sync.WaitGroup
	for range 4 {
		name := w.export(stuck)
		waiting.Go(func() {
			c, err := w.open(p, name, false)
			if err != nil {
				t.Error(err)
				return
			}
			c.Close()
		})
	}
	w.waitCalls("VBD.plug", 2)
	if _, err := conn.ReadAt(make([]byte, 4096), 0); err != nil {
		t.Error(err)
	}
	more, err := w.open(p, w.export(vdi), false)
	if err != nil {
		t.Fatal(err)
	}
	more.Close()
	third := w.addVDI(random(3, 1<<20), xapitest.VDISpec{})
	if _, err := w.open(p, w.export(third), false); err == nil || !bytes.Contains([]byte(err.Error()), []byte("max_vbds is 2")) {
		t.Errorf("a third VDI: got %v, want the limit", err)
	}
	eventually(t, func() string { // before the waiting ones have been refused
		attachments := w.report().Attachments
		for _, a := range attachments {
			if a.VDI == stuck && a.Users == 4 {
				return ""
			}
		}
		return fmt.Sprintf("want 4 clients waiting for one VBD: %+v", attachments)
	})
	release()
	waiting.Wait()
	if n := w.count("VBD.create"); n != 2 {
		t.Errorf("VBD.create: got %d calls, want 2", n)
	}
}

// nbdWorld has a disk that is plugged as /dev/nbdN, on a loop device.
func nbdWorld(t *testing.T, content []byte) (*world, string) {
	t.Helper()
	requires.LoopDevices(t)
	w := newWorld(t, xapitest.Config{Loop: true, Style: xapitest.StyleNBD})
	return w, w.addVDI(content, xapitest.VDISpec{})
}

// TestForeignUnplugEndsConnections: another tool unplugs the service's VBD: connections end,
// idle ones too, and the unplug, which waits for the device to be closed, succeeds.
func TestForeignUnplugEndsConnections(t *testing.T) {
	w, vdi := nbdWorld(t, random(1, 1<<20))
	p := w.start()
	idle, err := w.open(p, w.export(vdi), false)
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	if err := w.host.UnplugVBD(t.Context(), w.host.VBDs()[0].UUID); err != nil {
		t.Error(err)
	}
	p.waitLine("the VDI was detached by somebody else")
	w.waitClean(p)
	again, err := w.open(p, w.export(vdi), false)
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
	w.waitClean(p)
}

// TestNoBytesOfAnotherDisk: the node is bound to another disk while clients read from it: they get
// EIO and the end of the connection, and not one byte of the other disk.
func TestNoBytesOfAnotherDisk(t *testing.T) {
	content := random(1, 4<<20)
	w, vdi := nbdWorld(t, content)
	stranger := filepath.Join(w.dir, "stranger")
	if err := os.WriteFile(stranger, bytes.Repeat([]byte{0xEE}, len(content)), 0o600); err != nil {
		t.Fatal(err)
	}
	p := w.start()
	var readers sync.WaitGroup
	begun := make(chan struct{})
	begin := sync.OnceFunc(func() { close(begun) })
	failures := make(chan error, 4)
	for i, size := range []int{4096, 64 << 10, 1 << 20, 2 << 20} {
		conn, err := w.open(p, w.export(vdi), i%2 == 1)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		readers.Go(func() {
			b := make([]byte, size)
			for off := int64(0); ; off = (off + int64(size)) % int64(len(content)) {
				n, err := conn.ReadAt(b, off)
				if !bytes.Equal(b[:n], content[off:off+int64(n)]) {
					failures <- fmt.Errorf("%d bytes at %d: bytes of another disk", size, off)
					return
				}
				if err != nil {
					failures <- err
					return
				}
				begin()
			}
		})
	}
	<-begun
	if err := w.host.Rebind(w.host.VBDs()[0].UUID, stranger); err != nil {
		t.Fatal(err)
	}
	readers.Wait()
	var seen []string
	for range 4 {
		err := <-failures
		seen = append(seen, err.Error())
		if errors.Is(err, wire.EIO) {
			continue
		}
		if bytes.Contains([]byte(err.Error()), []byte("another disk")) {
			t.Error(err)
		}
	}
	if !slices.ContainsFunc(seen, func(s string) bool { return bytes.Contains([]byte(s), []byte("EIO")) }) {
		t.Errorf("no read failed with EIO: %q", seen)
	}
	w.waitClean(p)
}

// TestClientsInARow: with limits of one, clients one after the other are all served: the place
// of one that has disconnected, with or without NBD_CMD_DISC, is free for the next, also for
// another VDI while the first is being unplugged.
func TestClientsInARow(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdis := []string{w.addVDI(random(1, 1<<20), xapitest.VDISpec{}), w.addVDI(random(2, 1<<20), xapitest.VDISpec{})}
	p := w.start("--max-connections=1", "--max-vbds=1", "--config="+w.file("row.toml", `linger = "1h"`))
	w.host.Delay("VBD.unplug", 20*time.Millisecond)
	for i := range 60 {
		vdi := vdis[i/2%2]
		// A place is free when the service has noticed that its client has gone.
		eventually(t, func() string {
			if n := w.report().Limits.Connections; n > 0 {
				return fmt.Sprintf("client %d: the place of the one before is not free", i)
			}
			return ""
		})
		if i%3 == 0 {
			w.abandon(p, vdi)
			continue
		}
		conn, err := w.open(p, w.export(vdi), false)
		if err != nil {
			t.Fatalf("client %d: %v", i, err)
		}
		conn.Close()
	}
}
