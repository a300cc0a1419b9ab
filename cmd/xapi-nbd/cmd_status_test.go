package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"xapi-nbd/cmd/xapi-nbd/internal/control"
	"xapi-nbd/nbd/client"
	"xapi-nbd/xapi/xapitest"
)

// status runs the command on the world's state folder. It fails the test if the output
// contains a session.
func (w *world) status(more ...string) (code int, stdout, stderr string) {
	w.t.Helper()
	var out, errOut bytes.Buffer
	code = run(context.Background(), append([]string{"status", "--state-dir=" + filepath.Join(w.dir, "state")}, more...), &out, &errOut)
	w.WantNoSecrets("status", out.String()+errOut.String())
	return code, out.String(), errOut.String()
}

// report returns the status, from status --json.
func (w *world) report() *control.StatusReport {
	w.t.Helper()
	code, out, errOut := w.status("--json")
	r := new(control.StatusReport)
	if err := json.Unmarshal([]byte(out), r); err != nil || code != 0 {
		w.t.Fatalf("status --json: exit code %d, %v\n%s%s", code, err, out, errOut)
	}
	return r
}

func TestStatusWithoutService(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	for _, args := range [][]string{nil, {"--json"}, {"--watch"}, {"--disconnect=1"}, {"--drain"}, {"--undrain"}} {
		if code, _, errOut := w.status(args...); code != 1 || errOut != "xapi-nbd: no running service was found\n" {
			t.Errorf("%q: got exit code %d and %q", args, code, errOut)
		}
	}
	p := w.start()
	p.kill() // leaves its socket behind
	if code, _, errOut := w.status(); code != 1 || errOut != "xapi-nbd: no running service was found\n" {
		t.Errorf("after a kill: got exit code %d and %q", code, errOut)
	}
	if code, _, _ := w.status("--watch", "--drain"); code != exitUsage {
		t.Errorf("two things at once: got exit code %d, want %d", code, exitUsage)
	}
}

func TestStatus(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	p := w.start("--config=" + w.file("rate.toml", `rate_limit = "1 GiB"`))
	if r := w.report(); r.State != control.StateServing || len(r.Connections) != 0 || len(r.Attachments) != 0 || !r.Xapi.Reachable {
		t.Errorf("at rest: got %+v", r)
	}
	conn, err := w.open(p, w.export(vdi), true)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.ReadAt(make([]byte, 300<<10), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := w.open(p, w.host.ExportName(vdi, w.deadSession()), false); err == nil {
		t.Fatal("a session that was logged out was accepted")
	}
	r := w.report()
	vbd := w.host.VBDs()[0].UUID
	if len(r.Attachments) != 1 || r.Attachments[0].VDI != vdi || r.Attachments[0].VBD != vbd ||
		r.Attachments[0].Stage != "attached" || r.Attachments[0].Users != 1 {
		t.Errorf("attachments: got %+v", r.Attachments)
	}
	if len(r.Journal) != 1 || r.Journal[0] != vbd {
		t.Errorf("journal: got %q, want %s", r.Journal, vbd)
	}
	c := served(t, r)
	if c.VDI != vdi || c.TLS != "TLS 1.3" || c.Bytes != 300<<10 || c.Rate <= 0 || !strings.HasPrefix(c.Peer, "127.0.0.1:") {
		t.Errorf("connection: got %+v", c)
	}
	if r.Limits.Connections != 1 || r.Limits.MaxConnections != 256 || r.Limits.VBDs != 1 || r.Limits.MaxVBDs != 16 || r.Limits.RateLimit != 1<<30 {
		t.Errorf("limits: got %+v", r.Limits)
	}
	if r.Refused["session"] != 1 || len(r.Listening) != 1 || r.Listening[0] != p.addr {
		t.Errorf("got refusals %v on %q", r.Refused, r.Listening)
	}
	w.waitScreen(
		"serving for", "xapi answers", "1 of 256", "1 of 16", "0 B (64.0 MiB shared)", "1.0 GiB/s", "session 1",
		vdi, vbd, "attached", "INFLIGHT", "300.0 KiB", "1.3", "127.0.0.1:", p.addr,
	)
}

// waitScreen waits until the status contains all texts, as bytes are counted after the client
// has received them.
func (w *world) waitScreen(texts ...string) {
	w.t.Helper()
	eventually(w.t, func() string {
		_, screen, _ := w.status()
		wantScreenWidth(w.t, screen)
		return lacking(screen, texts)
	})
}

// served returns the only connection that is served.
func served(t *testing.T, r *control.StatusReport) control.ConnectionReport {
	t.Helper()
	var found []control.ConnectionReport
	for _, c := range r.Connections {
		if c.State == "serving" {
			found = append(found, c)
		}
	}
	if len(found) != 1 {
		t.Fatalf("connections: got %+v, want one that is served", r.Connections)
	}
	return found[0]
}

func (w *world) deadSession() string {
	ref := w.session(xapitest.RoleVMAdmin)
	w.host.ExpireSession(ref)
	return ref
}

// startServing starts a service and a client that has read a sector, so that its connection
// is certainly served.
func startServing(t *testing.T) (*world, *process, *client.Conn) {
	t.Helper()
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	p := w.start()
	conn, err := w.open(p, w.export(vdi), false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if _, err := conn.ReadAt(make([]byte, 512), 0); err != nil { // the client may be ahead of the server
		t.Fatal(err)
	}
	return w, p, conn
}

func TestStatusDisconnect(t *testing.T) {
	w, p, conn := startServing(t)
	if code, _, errOut := w.status("--disconnect=4711"); code != 1 || !strings.Contains(errOut, "4711") {
		t.Errorf("no such connection: got exit code %d and %q", code, errOut)
	}
	id := served(t, w.report()).ID
	if code, out, errOut := w.status("--disconnect=" + id); code != 0 || out != "Connection "+id+" was closed.\n" {
		t.Errorf("got exit code %d, %q, %q", code, out, errOut)
	}
	if _, err := conn.ReadAt(make([]byte, 512), 0); err == nil {
		t.Error("the connection is still served")
	}
	w.waitClean(p)
	p.waitLine("disconnected by the administrator")
}

// TestStatusDisconnectVDI: all connections to one VDI are cut, and no others.
func TestStatusDisconnectVDI(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	one, other := w.addVDI(random(1, 1<<20), xapitest.VDISpec{}), w.addVDI(random(2, 1<<20), xapitest.VDISpec{})
	p := w.start()
	var conns []*client.Conn
	for _, vdi := range []string{one, one, other} {
		conn, err := w.open(p, w.export(vdi), false)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := conn.ReadAt(make([]byte, 512), 0); err != nil { // the client may be ahead of the server
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	want := "Connections to VDI " + one + " that were closed: 2.\n"
	if code, out, errOut := w.status("--disconnect=" + one); code != 0 || out != want {
		t.Errorf("got exit code %d, %q, %q, want %q", code, out, errOut, want)
	}
	for i, conn := range conns {
		if _, err := conn.ReadAt(make([]byte, 512), 0); (err == nil) != (i == 2) {
			t.Errorf("connection %d: %v", i, err)
		}
	}
}

// frames is a writer that sends each write to the channel.
type frames chan string

func (f frames) Write(p []byte) (int, error) {
	f <- string(p)
	return len(p), nil
}

func TestStatusWatch(t *testing.T) {
	w, p, conn := startServing(t)
	shown, tick, ended := make(frames), make(chan time.Time), make(chan error, 1)
	go func() { ended <- watch(t.Context(), filepath.Join(w.dir, "state"), false, shown, tick) }()
	rate := regexp.MustCompile(`serving +no +\S+ \S+ +(\S+) \S+/s`)
	var rates []string
	for i := range 3 {
		frame := <-shown
		wantScreenWidth(t, frame)
		if strings.HasPrefix(frame, "\n") != (i > 0) {
			t.Errorf("frame %d begins %q", i, frame[:20])
		}
		if m := rate.FindStringSubmatch(frame); m != nil {
			rates = append(rates, m[1])
		}
		if i == 0 {
			if _, err := conn.ReadAt(make([]byte, 1<<20), 0); err != nil {
				t.Fatal(err)
			}
		}
		if i == 2 {
			p.kill()
		}
		tick <- time.Now()
	}
	// The average, something between the first two, nothing since.
	if len(rates) != 3 || rates[0] == "0" || rates[1] == "0" || rates[2] != "0" {
		t.Errorf("rates of three frames: got %q", rates)
	}
	var exit *exitError
	if err := <-ended; !errors.As(err, &exit) || exit.code != 1 {
		t.Errorf("when the service has gone: got %v, want exit code 1", err)
	}
}

// TestFrames: on a terminal each frame replaces the previous one, elsewhere it follows it.
func TestFrames(t *testing.T) {
	r := &control.StatusReport{Version: "1", Now: time.Now(), Started: time.Now()}
	tests := []struct {
		name            string
		last            *control.StatusReport
		asJSON, inPlace bool
		begin           string
	}{
		{"terminal", r, false, true, clearScreen + "xapi-nbd 1"},
		{"first", nil, false, false, "xapi-nbd 1"},
		{"next", r, false, false, "\nxapi-nbd 1"},
		{"JSON", r, true, true, `{"version":"1"`},
	}
	for _, tt := range tests {
		var out bytes.Buffer
		if err := showFrame(&out, r, tt.last, tt.asJSON, tt.inPlace); err != nil || !strings.HasPrefix(out.String(), tt.begin) {
			t.Errorf("%s: got %q, %v, want it to begin with %q", tt.name, out.String(), err, tt.begin)
		}
		if tt.asJSON && strings.Count(out.String(), "\n") != 1 {
			t.Errorf("%s: got more than a line: %q", tt.name, out.String())
		}
	}
}

// wantScreenWidth requires lines of at most 80 columns.
func wantScreenWidth(t *testing.T, text string) {
	t.Helper()
	for line := range strings.Lines(text) {
		if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > 80 {
			t.Errorf("a line of %d columns: %q", n, line)
		}
	}
}
