package main

import (
	"context"
	"encoding/json"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"xapi-nbd/cmd/nbd-tool/internal/control"
	"xapi-nbd/nbd"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/nbdtest"
)

// mirrorSize is no multiple of any block size of a mirror.
const mirrorSize = 5<<20 + 512

// shortDir returns a folder whose name is short enough for sockets. It is removed at the end of the
// test.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "mirror")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// mirrorRun is a running nbd-tool mirror.
type mirrorRun struct {
	*served
	t    *testing.T
	ctl  string // the control socket
	conn *client.Conn
	disk []byte // what clients have written
}

// startMirror starts a mirror. The content of the primary is disk.
func startMirror(t *testing.T, disk []byte, args ...string) *mirrorRun {
	t.Helper()
	dir := shortDir(t)
	m := &mirrorRun{t: t, ctl: filepath.Join(dir, "ctl"), disk: append([]byte(nil), disk...)}
	m.served = startServing(t, append([]string{"mirror", "--listen=unix:" + filepath.Join(dir, "nbd"), "--control=unix:" + m.ctl}, args...)...)
	m.connect()
	return m
}

// uri returns the URI of the mirrored disk.
func (m *mirrorRun) uri() string {
	return "nbd+unix:///?socket=" + url.QueryEscape(strings.TrimPrefix(m.addr, "unix:"))
}

// connect connects a client, which is disconnected at the end of the test.
func (m *mirrorRun) connect() {
	m.t.Helper()
	ctx := context.WithoutCancel(m.t.Context())
	c, err := client.Dial(ctx, "unix", strings.TrimPrefix(m.addr, "unix:"), nil)
	if err == nil {
		m.conn, err = c.Go(ctx, "")
	}
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { m.conn.Close() })
}

// write writes n bytes at off, which depend on seed.
func (m *mirrorRun) write(off, n int, seed uint64) {
	m.t.Helper()
	p := nbdtest.Bytes(n, int64(off), seed)
	if err := m.conn.Write(m.t.Context(), p, int64(off), false); err != nil {
		m.t.Fatalf("write of %d bytes at %d: %v", n, off, err)
	}
	copy(m.disk[off:], p)
}

// writeSome makes writes of every alignment.
func (m *mirrorRun) writeSome(seed uint64) {
	m.t.Helper()
	for off := 1000; off < len(m.disk); off += 777_777 {
		m.write(off, min(70_000, len(m.disk)-off), seed)
	}
	if err := m.conn.WriteZeroes(m.t.Context(), 1<<20, 300_000, client.ZeroOptions{}); err != nil {
		m.t.Fatal(err)
	}
	clear(m.disk[1<<20 : 1<<20+300_000])
	if err := m.conn.Flush(m.t.Context()); err != nil {
		m.t.Fatal(err)
	}
}

// command runs nbd-tool ctl, which must succeed.
func (m *mirrorRun) command(args ...string) string {
	m.t.Helper()
	return succeed(m.t, append([]string{"ctl", m.ctl}, args...)...)
}

// status returns the state of the mirror.
func (m *mirrorRun) status() (s control.Status) {
	m.t.Helper()
	if err := json.Unmarshal([]byte(m.command("status", "--json")), &s); err != nil {
		m.t.Fatal(err)
	}
	return s
}

// end stops the mirror and returns the exit code, the last line of its output, and its error
// output.
func (m *mirrorRun) end() (code int, last, errOut string) {
	m.t.Helper()
	code, errOut = m.stop()
	for line := range m.lines {
		last = line
	}
	if entries, err := os.ReadDir(filepath.Dir(m.ctl)); err != nil || len(entries) > 0 {
		m.t.Errorf("left behind: %v, %v", entries, err)
	}
	return code, last, errOut
}

// endComplete is end of a mirror that was completed.
func (m *mirrorRun) endComplete() {
	m.t.Helper()
	code, last, errOut := m.end()
	if code != exitOK || !strings.HasPrefix(last, "complete: ") {
		m.t.Errorf("exit code %d, last line %q, error output %q; want the secondary to be complete", code, last, errOut)
	}
}

// endIncomplete is end of a mirror that was not completed.
func (m *mirrorRun) endIncomplete(want ...string) {
	m.t.Helper()
	code, last, errOut := m.end()
	if last != "" {
		m.t.Errorf("last line %q, want none", last)
	}
	checkFailure(m.t, result{code: code, err: errOut}, exitFailed, append(want, "NOT complete: ")...)
}

// ramExport serves a device in memory, for any number of connections.
func ramExport(t *testing.T, ram *nbdtest.RAM) (uri string) {
	return serveOne(t, func() nbd.Device { return ram.Again() })
}

// TestMirrorPivot: clients go on on the secondary.
func TestMirrorPivot(t *testing.T) {
	disk := content(mirrorSize)
	primary := writeFile(t, "primary", disk)
	ram := nbdtest.NewRAM(make([]byte, len(disk)))
	m := startMirror(t, disk, primary, ramExport(t, ram))
	m.writeSome(1)
	m.command("wait")
	m.writeSome(2)
	m.command("complete", "--pivot", "--verify")
	sameBytes(t, "secondary, on stable storage", ram.Stable(), m.disk)
	sameBytes(t, "primary", readFile(t, primary), m.disk)
	if s := m.status(); s.State != "pivoted" || s.Serving != "secondary" || !s.Complete || !s.Ended || s.Dirty != 0 {
		t.Errorf("got %+v", s)
	}
	before := append([]byte(nil), m.disk...)
	m.writeSome(3)
	got := make([]byte, len(disk))
	if err := m.conn.Read(t.Context(), got, 0); err != nil {
		t.Fatal(err)
	}
	sameBytes(t, "as clients see it", got, m.disk)
	sameBytes(t, "secondary after the pivot", ram.Stable(), m.disk)
	sameBytes(t, "primary after the pivot", readFile(t, primary), before)
	m.endComplete()
}

// TestMirrorStop: clients are disconnected, and the command ends.
func TestMirrorStop(t *testing.T) {
	disk := content(mirrorSize)
	secondary := filepath.Join(t.TempDir(), "secondary")
	ram := nbdtest.NewRAM(disk)
	m := startMirror(t, disk, ramExport(t, ram), secondary)
	m.writeSome(1)
	m.command("complete", "--stop")
	sameBytes(t, "secondary", readFile(t, secondary), m.disk)
	sameBytes(t, "primary, on stable storage", ram.Stable(), m.disk)
	if err := m.conn.Write(t.Context(), []byte{1}, 0, false); err == nil {
		t.Error("a write after the end has succeeded")
	}
	last := ""
	for line := range m.lines { // until it has ended by itself
		last = line
	}
	if code, errOut := m.stop(); code != exitOK || !strings.HasPrefix(last, "complete: "+secondary) {
		t.Errorf("exit code %d, last line %q, error output %q", code, last, errOut)
	}
}

// TestMirrorStopped: what a signal or a cancel leaves is not complete, and says so.
func TestMirrorStopped(t *testing.T) {
	disk := content(mirrorSize)
	for _, cancel := range []bool{false, true} {
		primary := nbdtest.NewRAM(disk)
		m := startMirror(t, disk, ramExport(t, primary), writeFile(t, "secondary", make([]byte, len(disk))))
		m.command("wait")
		if cancel {
			m.command("cancel")
			checkFailure(t, tool(t, "ctl", m.ctl, "complete", "--pivot"), exitFailed, "complete: ")
			checkFailure(t, tool(t, "ctl", m.ctl, "wait"), exitFailed, "wait: ")
		}
		m.writeSome(1) // clients are served on
		if s := m.status(); s.Complete || s.Serving != "primary" || s.Ended != cancel {
			t.Errorf("got %+v", s)
		}
		m.conn.Close()
		m.endIncomplete("is no copy of", "cancelled with ")
		sameBytes(t, "primary", primary.Stable(), m.disk)
	}
}

// TestMirrorPause: what is written meanwhile is not copied.
func TestMirrorPause(t *testing.T) {
	disk := content(mirrorSize)
	ram := nbdtest.NewRAM(make([]byte, len(disk)))
	m := startMirror(t, disk, writeFile(t, "primary", disk), ramExport(t, ram))
	m.command("wait")
	m.command("pause")
	m.write(0, 1000, 9)
	if s := m.status(); !s.Paused {
		t.Errorf("got %+v, want it to be paused", s)
	}
	if got := m.command("status"); !strings.Contains(got, ", paused\n") || !strings.Contains(got, "secondary complete") {
		t.Errorf("got %s", got)
	}
	checkFailure(t, tool(t, "ctl", m.ctl, "complete", "--stop"), exitFailed, "paused")
	m.command("resume")
	m.command("complete", "--stop")
	sameBytes(t, "secondary", ram.Stable(), m.disk)
	m.endComplete()
}
