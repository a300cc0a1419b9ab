package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"xapi-nbd/cmd/xapi-nbd/internal/control"
	"xapi-nbd/xapi/xapitest"
)

// cleanup runs the command on the world's host.
func (w *world) cleanup(more ...string) (code int, stdout, stderr string) {
	w.t.Helper()
	var out, errOut bytes.Buffer
	code = run(context.Background(), w.cleanupArgs(more...), &out, &errOut)
	return code, out.String(), errOut.String()
}

func (w *world) cleanupArgs(more ...string) []string {
	return append([]string{
		"cleanup", "--xapi-socket=" + w.host.Socket(), "--inventory=" + w.host.Inventory(),
		"--state-dir=" + filepath.Join(w.dir, "state"),
	}, more...)
}

// leaveBehind kills a service while it serves a client, and returns the uuid of its VBD.
func (w *world) leaveBehind(vdi string) string {
	w.t.Helper()
	p := w.start()
	w.mustOpen(p, vdi)
	p.kill()
	return w.host.VBDs()[0].UUID
}

func TestCleanup(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	if code, out, _ := w.cleanup(); code != 0 || out != "Nothing was left behind.\n" {
		t.Errorf("nothing to do: got exit code %d and %q", code, out)
	}
	foreign, err := w.host.AddForeignVBD(vdi, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.host.PlugForeign(foreign); err != nil {
		t.Fatal(err)
	}
	w.host.ResetCalls()
	p := w.start()
	w.mustOpen(p, vdi)
	p.kill()
	ours := w.host.VBDs()[1].UUID

	w.host.FailAlways("VBD.unplug", "INTERNAL_ERROR", "no") // it may be tried more than once
	code, out, errOut := w.cleanup()
	w.host.ClearFaults()
	if code != exitLeft || out != "left    "+ours+"\n" || !strings.Contains(errOut, "INTERNAL_ERROR") {
		t.Errorf("unplug fails: got exit code %d, %q, %q", code, out, errOut)
	}
	if code, out, errOut = w.cleanup(); code != 0 || out != "removed "+ours+"\n" {
		t.Errorf("got exit code %d, %q, %q", code, out, errOut)
	}
	if left := w.host.VBDs(); len(left) != 1 || left[0].UUID != foreign || !left[0].CurrentlyAttached {
		t.Errorf("VBDs: got %+v, want the foreign one as it was", left)
	}
	if got := w.journal(); got != "" {
		t.Errorf("journal: got %q, want it empty", got)
	}
}

// TestCleanupAsksTheService: with a service running, cleanup asks it to clean up. VDIs that
// it serves stay attached.
func TestCleanupAsksTheService(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	p := w.start()
	conn := w.mustOpen(p, vdi)
	live := w.host.VBDs()[0].UUID
	p.waitCalm(w) // its own recovery would remove the leftover
	leaked, err := w.host.AddForeignVBD(vdi, map[string]string{"xapi-nbd": w.host.InstallationUUID() + " nonce"})
	if err != nil {
		t.Fatal(err)
	}
	code, out, errOut := w.cleanup()
	want := "The service is running; it has been asked to clean up.\nremoved " + leaked + "\n"
	if code != 0 || out != want {
		t.Errorf("got exit code %d, %q, %q, want %q", code, out, errOut, want)
	}
	if vbds := w.host.VBDs(); len(vbds) != 1 || vbds[0].UUID != live {
		t.Errorf("VBDs: got %+v, want the live one", vbds)
	}
	if _, err := conn.ReadAt(make([]byte, 4096), 0); err != nil {
		t.Errorf("read during the clean-up: %v", err)
	}
	if st, err := os.Stat(filepath.Join(w.dir, "state", control.SocketName)); err != nil || st.Mode().Perm()&0o077 != 0 {
		t.Errorf("control socket: got %v, %v, want it for its owner only", st, err)
	}
	w.host.FailAlways("VBD.destroy", "INTERNAL_ERROR", "no")
	if leaked, err = w.host.AddForeignVBD(vdi, map[string]string{"xapi-nbd": w.host.InstallationUUID() + " other"}); err != nil {
		t.Fatal(err)
	}
	if code, out, _ = w.cleanup(); code != exitLeft || !strings.Contains(out, "left    "+leaked) {
		t.Errorf("destroy fails: got exit code %d, %q", code, out)
	}
	w.host.ClearFaults()
	if code, _, _ = w.cleanup(); code != 0 {
		t.Errorf("got exit code %d", code)
	}
	conn.Close()
	w.waitClean(p)
}

// TestCleanupBesideAnother: a second clean-up waits for the first one and then does its work.
func TestCleanupBesideAnother(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	ours := w.leaveBehind(w.addVDI(random(1, 1<<20), xapitest.VDISpec{}))
	release := w.flock()
	var out sharedBuffer
	ended := make(chan int)
	go func() { ended <- run(context.Background(), w.cleanupArgs(), &out, io.Discard) }()
	eventually(t, func() string { return lacking(out.String(), []string{"Another clean-up is running"}) })
	release()
	if code := <-ended; code != 0 || !strings.HasSuffix(out.String(), "removed "+ours+"\n") {
		t.Errorf("got exit code %d and %q", code, out.String())
	}
}

// sharedBuffer is a bytes.Buffer that may be read while it is written.
type sharedBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *sharedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *sharedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// TestCleanupWithoutXapi: without xapi only the VBDs of the journal are known to be left.
func TestCleanupWithoutXapi(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	w.host.Stop()
	if code, _, errOut := w.cleanup(); code != exitUnreachable || !strings.Contains(errOut, "xapi") {
		t.Errorf("got exit code %d and %q, want %d", code, errOut, exitUnreachable)
	}
	if err := w.host.Resume(); err != nil {
		t.Fatal(err)
	}
	ours := w.leaveBehind(vdi)
	w.host.Stop()
	if code, out, _ := w.cleanup(); code != exitLeft || !strings.Contains(out, ours) {
		t.Errorf("got exit code %d and %q, want %d and the VBD", code, out, exitLeft)
	}
	if err := w.host.Resume(); err != nil {
		t.Fatal(err)
	}
	if code, _, _ := w.cleanup(); code != 0 {
		t.Errorf("with xapi back: got exit code %d", code)
	}
}

// TestCleanupWithUnusableAnswers: the exit code is 4 only if xapi did not answer. After an
// unusable answer, so that it is not known whether something is left, it is 5, also with a
// running service.
func TestCleanupWithUnusableAnswers(t *testing.T) {
	tests := []struct {
		name  string
		fault func(w *world)
		code  int
		text  string
	}{
		{"HTTP status 500", func(w *world) { w.host.FailHTTP("session.login_with_password") }, exitLeft, "HTTP status 500"},
		{"still booting", func(w *world) { w.host.Fail("session.login_with_password", "HOST_STILL_BOOTING") }, exitLeft, "HOST_STILL_BOOTING"},
		{"error for the list", func(w *world) { w.host.Fail("VBD.get_all_records_where", "INTERNAL_ERROR", "Db_exn") }, exitLeft, "INTERNAL_ERROR"},
		{"no answer", func(w *world) { w.host.DropConnection("session.login_with_password") }, exitUnreachable, "unexpected EOF"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, xapitest.Config{})
			check := func(who string) {
				t.Helper()
				tt.fault(w)
				if code, out, errOut := w.cleanup(); code != tt.code || !strings.Contains(errOut, tt.text) {
					t.Errorf("%s: got exit code %d, %q, %q, want %d and %q", who, code, out, errOut, tt.code, tt.text)
				}
			}
			check("without a service")
			w.host.ResetCalls()
			p := w.start()
			p.waitCalm(w) // else its own recovery would meet the injected fault
			check("with a service")
		})
	}
}

func TestCleanupUsage(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	if code, _, _ := w.cleanup("--state-dir=/dev/null"); code != exitUsage {
		t.Errorf("a state folder that is none: got exit code %d, want %d", code, exitUsage)
	}
	if code, _, errOut := w.cleanup("--inventory=/nonexistent"); code != exitUsage || !strings.Contains(errOut, "inventory: ") {
		t.Errorf("without an inventory: got exit code %d and %q, want %d", code, errOut, exitUsage)
	}
	// The unit gives the certificate by a flag that this command does not have.
	file := w.file("service.toml", "tls = \"require\"\n")
	if code, _, errOut := w.cleanup("--config=" + file); code != 0 {
		t.Errorf("the service's file: got exit code %d, %q", code, errOut)
	}
}

// TestCleanupOfOthersEntries: a VBD of another VM in the journal is not removed.
func TestCleanupOfOthersEntries(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	guests, err := w.host.AddForeignVBD(vdi, nil)
	if err == nil {
		err = errors.Join(w.host.PlugForeign(guests), w.host.MoveToOtherVM(guests))
	}
	if err != nil {
		t.Fatal(err)
	}
	w.cleanup() // makes the state folder
	if err := os.WriteFile(filepath.Join(w.dir, "state", "VBDs_to_clean_up"), []byte(guests+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	check := func(who string) {
		t.Helper()
		w.host.ResetCalls()
		if code, out, errOut := w.cleanup(); code != 0 || strings.Contains(out, "removed") {
			t.Errorf("%s: got exit code %d, %q, %q", who, code, out, errOut)
		}
		for _, c := range w.host.Calls() {
			if c.Method == "VBD.unplug" || c.Method == "VBD.destroy" {
				t.Errorf("%s: %s was called", who, c.Method)
			}
		}
		if got := w.host.VBDs(); len(got) != 1 || !got[0].CurrentlyAttached || w.journal() != guests+"\n" {
			t.Errorf("%s: VBDs: got %+v, journal %q, want both as they were", who, got, w.journal())
		}
	}
	check("without a service")
	p := w.start()
	check("with a service")
	if code := p.stop(patience); code != 0 {
		t.Errorf("the service does not end with 0 but %d", code)
	}
}

// TestCleanupWithAnotherStateFolder: cleanup with another state folder still asks the service
// of this host. VDIs that it serves stay attached.
func TestCleanupWithAnotherStateFolder(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	content := random(1, 1<<20)
	p := w.start()
	conn, err := w.open(p, w.export(w.addVDI(content, xapitest.VDISpec{})), false)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	code, out, errOut := w.cleanup("--state-dir=" + filepath.Join(w.dir, "other"))
	if code != 0 || !strings.Contains(out, "it has been asked to clean up") || strings.Contains(out, "removed") {
		t.Errorf("got exit code %d, %q, %q", code, out, errOut)
	}
	if got := w.host.VBDs(); len(got) != 1 || !got[0].CurrentlyAttached {
		t.Errorf("VBDs: got %+v, want that of the service", got)
	}
	read := make([]byte, len(content))
	if _, err := conn.ReadAt(read, 0); err != nil || !bytes.Equal(read, content) {
		t.Errorf("the disk cannot be read any more: %v", err)
	}
}

// TestCleanupDuringAHungUnplug: while an unplug hangs in xapi, cleanup ends and lists the
// VBD as left; so do status and log.
func TestCleanupDuringAHungUnplug(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	p := w.start()
	conn := w.mustOpen(p, vdi)
	vbd := w.host.VBDs()[0].UUID
	hangs, release := w.host.BlockWork("unplug")
	conn.Close()
	<-hangs
	w.host.DropConnections() // else the service would wait for the answer
	line := p.waitLine("cannot remove a VBD that was left behind")
	for _, want := range []string{vbd, "age=", "attempts=1", "err="} {
		if !strings.Contains(line, want) {
			t.Errorf("the log line lacks %s: %s", want, line)
		}
	}
	code, out, errOut := w.cleanup()
	if code != exitLeft || !strings.Contains(out, "left    "+vbd) || !strings.Contains(errOut, "still working on the VBD") {
		t.Errorf("cleanup: got exit code %d, %q, %q", code, out, errOut)
	}
	left := w.report().Leftovers
	if len(left) != 1 || left[0].VBD != vbd || left[0].VDI != vdi || left[0].Attempts == 0 ||
		left[0].LastError == "" || left[0].Since.IsZero() {
		t.Errorf("status: got %+v", left)
	}
	release()
	p.waitLine("removed a VBD that was left behind")
	w.waitClean(p)
	if left := w.report().Leftovers; len(left) != 0 {
		t.Errorf("status after it: got %+v", left)
	}
}
