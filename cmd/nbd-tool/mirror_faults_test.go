package main

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"xapi-nbd/cmd/nbd-tool/internal/control"
	"xapi-nbd/nbd"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/nbdtest"
)

// serveFaulty serves a device with faults under a URI.
func serveFaulty(t *testing.T, f *nbdtest.FaultyRAM) (uri string) {
	return serveOne(t, func() nbd.Device { return unclosed{f} })
}

// unclosed is a device that stays open, for other connections.
type unclosed struct{ *nbdtest.FaultyRAM }

func (unclosed) Close() error { return nil }

// statusWhen asks for the status until it fulfils a condition. Each answer takes a round trip, and
// the mirror works meanwhile.
func (m *mirrorRun) statusWhen(fulfils func(control.Status) bool) control.Status {
	m.t.Helper()
	for {
		s := m.status()
		if fulfils(s) {
			return s
		}
		if s.Ended {
			m.t.Fatalf("ended: %+v", s)
		}
	}
}

// TestMirrorErrorsPass: an error of the secondary that passes delays the mirror, and clients do
// not notice it.
func TestMirrorErrorsPass(t *testing.T) {
	for _, errno := range []syscall.Errno{syscall.EIO, syscall.ENOSPC} {
		t.Run(errno.Error(), func(t *testing.T) {
			disk := content(mirrorSize)
			secondary := nbdtest.NewFaultyRAM(nbdtest.NewRAM(make([]byte, len(disk))))
			secondary.Fail(1<<20, 2<<20, errno)
			primary := writeFile(t, "primary", disk)
			m := startMirror(t, disk, primary, serveFaulty(t, secondary))
			m.writeSome(1)
			m.statusWhen(func(s control.Status) bool { return s.LastError != "" })
			m.writeSome(2)
			secondary.Heal()
			m.command("complete", "--stop", "--verify")
			sameBytes(t, "secondary", secondary.RAM.Stable(), m.disk)
			sameBytes(t, "primary", readFile(t, primary), m.disk)
			m.endComplete()
		})
	}
}

// TestMirrorErrorsStay: after an error that stays, clients are served on, or their writes are
// refused, and nobody says that the secondary is complete.
func TestMirrorErrorsStay(t *testing.T) {
	for _, onError := range []string{"detach", "stop"} {
		t.Run(onError, func(t *testing.T) {
			disk := content(mirrorSize)
			secondary := nbdtest.NewFaultyRAM(nbdtest.NewRAM(make([]byte, len(disk))))
			secondary.Fail(1<<20, 1, syscall.ENOSPC)
			primary := writeFile(t, "primary", disk)
			m := startMirror(t, disk, "--on-error="+onError, "--retry-for=100ms", primary, serveFaulty(t, secondary))
			checkFailure(t, tool(t, "ctl", m.ctl, "wait"), exitFailed, "wait: ")
			if s := m.status(); s.Complete || !s.Ended || s.LastError == "" || (s.State == "detached") != (onError == "detach") {
				t.Errorf("got %+v", s)
			}
			checkFailure(t, tool(t, "ctl", m.ctl, "complete", "--pivot"), exitFailed, "complete: ")
			if onError == "detach" {
				m.writeSome(1)
			} else if err := m.conn.Write(t.Context(), []byte{1}, 0, false); !errors.Is(err, syscall.EIO) {
				t.Errorf("a write: got %v, want EIO", err)
			}
			sameBytes(t, "primary", readFile(t, primary), m.disk)
			m.conn.Close()
			m.endIncomplete("NBD_ENOSPC")
		})
	}
}

// TestMirrorPrimaryCannotBeRead: clients get the errors of what they read, and the secondary does
// not become complete.
func TestMirrorPrimaryCannotBeRead(t *testing.T) {
	disk := content(mirrorSize)
	primary := nbdtest.NewFaultyRAM(nbdtest.NewRAM(disk))
	m := startMirror(t, disk, "--retry-for=24h", serveFaulty(t, primary), filepath.Join(t.TempDir(), "secondary"))
	m.command("wait")
	primary.Fail(0, 512, syscall.EIO)
	if err := m.conn.Read(t.Context(), make([]byte, 512), 0); !errors.Is(err, syscall.EIO) {
		t.Errorf("a read: got %v, want EIO", err)
	}
	checkFailure(t, tool(t, "ctl", m.ctl, "complete", "--pivot", "--verify"), exitFailed, "complete: ")
	if s := m.status(); s.Complete || s.Serving != "primary" {
		t.Errorf("got %+v", s)
	}
	primary.Heal()
	m.writeSome(1) // goes on
	m.command("complete", "--stop", "--verify")
	m.endComplete()
}

// TestMirrorStall: a client waits for a secondary that hangs as long as --stall says.
func TestMirrorStall(t *testing.T) {
	disk := content(mirrorSize)
	secondary := nbdtest.NewFaultyRAM(nbdtest.NewRAM(make([]byte, len(disk))))
	m := startMirror(t, disk, "--stall=50ms", writeFile(t, "primary", disk), serveFaulty(t, secondary))
	m.command("wait")
	arrived, release := secondary.Hold()
	defer release()
	m.write(5000, 5000, 1) // returns although the secondary hangs
	<-arrived
	if s := m.status(); s.State == "in sync" || s.Stalls == 0 {
		t.Errorf("got %+v", s)
	}
	m.write(100_000, 5000, 2)
	release()
	m.command("complete", "--stop", "--verify")
	sameBytes(t, "secondary", secondary.RAM.Stable(), m.disk)
	m.endComplete()
}

// TestMirrorConnectionsLost: connections to both ends are cut, and made again.
func TestMirrorConnectionsLost(t *testing.T) {
	disk := content(mirrorSize)
	primary, secondary := nbdtest.NewRAM(disk), nbdtest.NewRAM(make([]byte, len(disk)))
	first, one := startRelay(t, ramExport(t, primary), 1<<30, 1<<30)
	second, two := startRelay(t, ramExport(t, secondary), 1<<30, 2<<20, 700<<10)
	m := startMirror(t, disk, "--connections=1", one, two)
	m.writeSome(1)
	m.command("wait")
	second.cutAll()
	m.writeSome(2)
	first.cutAll()
	m.write(0, 10, 3)
	_ = m.conn.Flush(t.Context()) // may report that writes may have been lost
	m.writeSome(4)
	m.command("complete", "--stop", "--verify")
	sameBytes(t, "secondary", secondary.Stable(), m.disk)
	sameBytes(t, "primary", primary.Stable(), m.disk)
	m.endComplete()
}

// TestMirrorPrimaryForgets: when the primary may have lost what clients had not flushed, their
// next flush says so, and both ends become equal again.
func TestMirrorPrimaryForgets(t *testing.T) {
	disk := content(mirrorSize)
	primary := startForgetting(t, disk, 2)
	secondary := filepath.Join(t.TempDir(), "secondary")
	// With one connection there is one loss, which is noticed at once.
	m := startMirror(t, disk, "--connections=1", "nbd://"+primary.addr+"/", secondary)
	m.command("wait")
	m.write(0, 4096, 1)
	first := m.conn
	m.connect()
	m.write(8192, 4096, 1) // before this one the server is restarted, without the first one
	<-primary.restarted
	for _, conn := range []*client.Conn{m.conn, first} { // each learns of it
		if err := conn.Flush(t.Context()); !errors.Is(err, syscall.EIO) {
			t.Errorf("the flush after the loss: got %v, want EIO", err)
		}
		if err := conn.Flush(t.Context()); err != nil {
			t.Errorf("the flush after that: %v", err)
		}
	}
	m.connect()
	if err := m.conn.Flush(t.Context()); err != nil {
		t.Errorf("the flush of a client that has come later: %v", err)
	}
	m.command("complete", "--stop", "--verify")
	sameBytes(t, "secondary", readFile(t, secondary), primary.ram.Stable())
	m.endComplete()
}

// TestMirrorControllers: several at a time, and one that goes away while it waits.
func TestMirrorControllers(t *testing.T) {
	disk := content(mirrorSize)
	primary, secondary := nbdtest.NewRAM(disk), nbdtest.NewFaultyRAM(nbdtest.NewRAM(make([]byte, len(disk))))
	arrived, release := secondary.Hold()
	defer release()
	m := startMirror(t, disk, ramExport(t, primary), serveFaulty(t, secondary))
	<-arrived
	gone, leave := context.WithCancel(t.Context())
	var waiting sync.WaitGroup
	for _, command := range [][]string{{"wait"}, {"complete", "--pivot"}} {
		waiting.Go(func() {
			if r := toolWith(t, gone, "", append([]string{"ctl", m.ctl}, command...)...); r.code != exitFailed {
				t.Errorf("%q: exit code %d, want that of an interrupted command", command, r.code)
			}
		})
	}
	m.statusWhen(func(s control.Status) bool { return s.State == "completing" })
	checkFailure(t, tool(t, "ctl", m.ctl, "complete", "--stop"), exitFailed, "complete: ")
	leave()
	waiting.Wait()
	release()
	m.command("wait") // the complete has not been withdrawn
	m.statusWhen(func(s control.Status) bool { return s.State == "pivoted" })
	m.writeSome(1)
	sameBytes(t, "secondary", secondary.RAM.Content(), m.disk)
	m.endComplete()
}

// killed starts a mirror as a process, writes, and kills it. It returns what the client has
// written.
func killed(t *testing.T, dir string, disk []byte, args ...string) (written []byte) {
	t.Helper()
	ctl := filepath.Join(dir, "ctl")
	cmd, _ := startProcess(t, args...)
	m := &mirrorRun{served: &served{addr: "unix:" + filepath.Join(dir, "nbd")}, t: t, ctl: ctl, disk: append([]byte(nil), disk...)}
	m.connect()
	m.writeSome(1)
	m.write(3<<20, 128<<10, 1)
	m.command("wait")
	m.writeSome(2)
	m.command("pause")
	if err := m.conn.Trim(t.Context(), 3<<20, 128<<10, false); err != nil { // which is not copied any more
		t.Fatal(err)
	}
	clear(m.disk[3<<20 : 3<<20+128<<10])
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	return m.disk
}

// TestMirrorKilled: the primary has what clients wrote, and the same command begins again, or goes
// on with --state, on the same sockets and files.
func TestMirrorKilled(t *testing.T) {
	for _, resumed := range []bool{false, true} {
		dir, disk := shortDir(t), content(mirrorSize)
		primary, secondary := writeFile(t, "primary", disk), filepath.Join(t.TempDir(), "secondary")
		args := []string{"mirror", "--listen=unix:" + dir + "/nbd", "--control=unix:" + dir + "/ctl", primary, secondary}
		if resumed { // the secondary does not read as zeroes then
			args = append(args, "--destination-is-zero", "--state="+filepath.Join(t.TempDir(), "state"))
		}
		written := killed(t, dir, disk, args...)
		sameBytes(t, "primary", readFile(t, primary), written)
		cmd, errOut := startProcess(t, args...)
		m := &mirrorRun{served: &served{addr: "unix:" + dir + "/nbd"}, t: t, ctl: dir + "/ctl", disk: written}
		m.connect()
		m.writeSome(3)
		ended := watchControl(t, m.ctl)
		m.command("complete", "--stop", "--verify")
		ended()
		if err := cmd.Wait(); err != nil {
			t.Errorf("%v: %s", err, errOut)
		}
		sameBytes(t, "secondary", readFile(t, secondary), m.disk)
		sameBytes(t, "primary", readFile(t, primary), m.disk)
		if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
			t.Errorf("left behind: %v, %v", entries, err)
		}
		if resumed { // what was completed cannot be continued
			fail(t, exitFailed, []string{"completed"}, args...)
		}
	}
}

// TestMirrorStateOfAnother: the file of --state belongs to one mirror. Nothing is written if it is
// another one's.
func TestMirrorStateOfAnother(t *testing.T) {
	dir, disk := shortDir(t), content(mirrorSize)
	primary, secondary := writeFile(t, "primary", disk), filepath.Join(t.TempDir(), "secondary")
	state := filepath.Join(t.TempDir(), "state")
	killed(t, dir, disk, "mirror", "--listen=unix:"+dir+"/nbd", "--control=unix:"+dir+"/ctl", "--state="+state, primary, secondary)
	before := readFile(t, state)
	other := writeFile(t, "other", disk)
	fail(t, exitFailed, []string{"another mirror"}, "mirror", "--state="+state, primary, other)
	sameBytes(t, "the other secondary", readFile(t, other), disk)
	for _, path := range []string{primary, secondary} { // the disk was enlarged
		if err := os.Truncate(path, mirrorSize+512); err != nil {
			t.Fatal(err)
		}
	}
	fail(t, exitFailed, []string{"another mirror", "bytes"}, "mirror", "--state="+state, primary, secondary)
	sameBytes(t, "state", readFile(t, state), before)
}

// TestMirrorSecondaryKilled: the server of the secondary is killed. When it comes back the mirror
// goes on, else it says that the secondary is incomplete.
func TestMirrorSecondaryKilled(t *testing.T) {
	for _, back := range []bool{true, false} {
		dir, disk := shortDir(t), content(mirrorSize)
		image := writeFile(t, "secondary", make([]byte, len(disk)))
		primary := writeFile(t, "primary", disk)
		server := []string{"serve", "--writable", "--listen=unix:" + dir + "/s", image}
		cmd, _ := startProcess(t, server...)
		m := startMirror(t, disk, "--retry-for="+map[bool]string{true: "24h", false: "200ms"}[back], primary, "nbd+unix:///?socket="+dir+"/s")
		m.command("wait")
		m.writeSome(1)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		m.write(0, 5000, 2) // the client goes on
		if back {
			startProcess(t, server...)
			m.writeSome(3)
			m.command("complete", "--stop", "--verify")
			sameBytes(t, "secondary", readFile(t, image), m.disk)
			m.endComplete()
		} else {
			for m.status().State != "detached" { // each takes a round trip
			}
			m.writeSome(3)
			m.conn.Close()
			m.endIncomplete("detached with ")
		}
		sameBytes(t, "primary", readFile(t, primary), m.disk)
	}
}

// TestMirrorHangup: SIGHUP, which a terminal sends when it is closed, ends nothing.
func TestMirrorHangup(t *testing.T) {
	dir, disk := shortDir(t), content(mirrorSize)
	secondary := filepath.Join(t.TempDir(), "secondary")
	cmd, errOut := startProcess(t, "mirror", "--listen=unix:"+dir+"/nbd", "--control=unix:"+dir+"/ctl", writeFile(t, "primary", disk), secondary)
	m := &mirrorRun{served: &served{addr: "unix:" + dir + "/nbd"}, t: t, ctl: dir + "/ctl", disk: disk}
	m.connect()
	if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	errOut.wait(t, func(text string) bool { return strings.Contains(text, "SIGHUP is ignored") })
	m.writeSome(1)
	m.command("wait")
	m.conn.Close()
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != exitFailed || !strings.Contains(errOut.String(), "NOT complete") {
		t.Errorf("got %v, error output %s", err, errOut)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

// TestControlProtocol: what clients of the control socket may send.
func TestControlProtocol(t *testing.T) {
	disk := content(1 << 20)
	m := startMirror(t, disk, writeFile(t, "primary", disk), filepath.Join(t.TempDir(), "secondary"))
	c, err := net.Dial("unix", m.ctl)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	replies := json.NewDecoder(c)
	for _, tt := range []struct{ request, want string }{
		{`{"command":"status"}`, ""},
		{`{"command":"wait"}`, ""},
		{`{"command":"pause"}` + "\n" + `{"command":"resume"}`, ""},
		{`{"command":"pivot"}`, `unknown command "pivot"`},
		{`{"command":"complete"}`, `complete needs then, "pivot" or "stop"`},
		{`{"command":"complete","then":"reboot"}`, `complete needs then`},
		{`{"command":"cancel","then":"stop"}`, `then and verify belong to "complete"`},
		{`{"command":"status","colour":"red"}`, `unknown field "colour"`},
		{`{"command":"status"} {}`, "more than one object"},
		{`status`, "invalid request"},
		{``, "invalid request"},
	} {
		if _, err := c.Write([]byte(tt.request + "\n")); err != nil {
			t.Fatal(err)
		}
		for range strings.Count(tt.request, "\n") + 1 {
			var r control.Reply
			if err := replies.Decode(&r); err != nil {
				t.Fatalf("%s: %v", tt.request, err)
			}
			if r.OK != (tt.want == "") || !strings.Contains(r.Error, tt.want) || r.OK && r.Status.Size != 1<<20 {
				t.Errorf("%s: got %+v", tt.request, r)
			}
		}
	}
	fail(t, exitFailed, []string{"no mirror answers"}, "ctl", "/no/such/socket", "status")
	fail(t, exitUsage, []string{"want PATH and one of status, pause"}, "ctl", m.ctl, "end")
	fail(t, exitUsage, []string{"complete needs --pivot or --stop"}, "ctl", m.ctl, "complete")
	fail(t, exitUsage, []string{"complete needs --pivot or --stop"}, "ctl", m.ctl, "complete", "--pivot", "--stop")
	fail(t, exitUsage, []string{"belong to complete"}, "ctl", m.ctl, "status", "--verify")
	if _, err := c.Write([]byte(strings.Repeat(" ", 5000) + "\n")); err == nil {
		if err := replies.Decode(new(control.Reply)); err == nil {
			t.Error("a line that is too long was answered")
		}
	}
	m.command("complete", "--stop")
	m.endComplete()
}
