package main

import (
	"bytes"
	"encoding/json"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"xapi-nbd/cmd/xapi-nbd/internal/proc"
	"xapi-nbd/test/requires"
	"xapi-nbd/xapi/xapitest"
)

// Nothing is wrong with the scene as it is: else no fault would prove anything.
func TestCheckFindsNothing(t *testing.T) {
	s := newScene(t)
	report := s.check()
	if report.Problems != 0 || report.Warnings != 0 {
		t.Errorf("got\n%s", textOf(t, &report))
	}
	for _, what := range []string{
		"configuration", "service", "state folder", "inventory", "certificate", "certificate time", "certificate names",
		"xapi socket", "xapi login", "host", "control domain", "network purposes", "journal", "device folder", "address",
		"open files", "pipes", "kernel",
	} {
		if len(report.found(what)) != 1 {
			t.Errorf("%s: got %+v, want one finding", what, report.found(what))
		}
	}
}

func TestCheckFindsEachFault(t *testing.T) {
	for _, f := range checkFaults {
		t.Run(f.name, func(t *testing.T) {
			s := newScene(t)
			f.inject(s)
			report := s.check()
			wantFindings(t, &report, f.want)
			s.wantNoSecret(textOf(t, &report))
		})
	}
}

// One problem hides no other.
func TestCheckFindsAllFaults(t *testing.T) {
	s := newScene(t)
	var want []wanted
	for _, f := range checkFaults {
		if !f.alone {
			f.inject(s)
			want = append(want, f.want...)
		}
	}
	report := s.check()
	wantFindings(t, &report, want)
	s.wantNoSecret(textOf(t, &report))
	wantReadable(t, textOf(t, &report))
	wantSchema(t, &report)
}

// wantFindings requires these findings, and nothing else that is not all right.
func wantFindings(t *testing.T, report *checkReport, want []wanted) {
	t.Helper()
	matches := func(f finding, w wanted) bool {
		return f.Level == w.level && f.What == w.what && strings.Contains(f.Detail, w.detail) && strings.Contains(f.Remedy, w.remedy)
	}
	for _, w := range want {
		if !slices.ContainsFunc(report.Findings, func(f finding) bool { return matches(f, w) }) {
			t.Errorf("not found: %+v", w)
		}
	}
	for _, f := range report.Findings {
		if f.Level != levelOK && !slices.ContainsFunc(want, func(w wanted) bool { return matches(f, w) }) {
			t.Errorf("found, and not wanted: %+v", f)
		}
	}
	if t.Failed() {
		t.Logf("the report:\n%s", textOf(t, report))
	}
}

func textOf(t *testing.T, report *checkReport) string {
	t.Helper()
	var b strings.Builder
	if err := report.text(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// wantNoSecret: no ref of any session may be printed, so none of anything is.
func (s *scene) wantNoSecret(text string) {
	s.t.Helper()
	if strings.Contains(text, "OpaqueRef:") {
		s.t.Errorf("a ref is printed:\n%s", text)
	}
	for _, secret := range s.secrets {
		if strings.Contains(text, secret) {
			s.t.Errorf("a session ref is printed:\n%s", text)
		}
	}
}

// wantReadable: only a word that is longer than a line makes one too long.
func wantReadable(t *testing.T, text string) {
	t.Helper()
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		if utf8.RuneCountInString(line) > 80 && len(strings.Fields(line)) > 1 {
			t.Errorf("longer than 80 columns: %q", line)
		}
	}
}

// wantSchema: what programs rely on.
func wantSchema(t *testing.T, report *checkReport) {
	t.Helper()
	var b bytes.Buffer
	if err := report.json(&b); err != nil {
		t.Fatal(err)
	}
	var got struct {
		Version  *string `json:"version"`
		Problems *int    `json:"problems"`
		Warnings *int    `json:"warnings"`
		Findings []struct {
			Level  string `json:"level"`
			What   string `json:"what"`
			Detail string `json:"detail"`
			Remedy string `json:"remedy"`
		} `json:"findings"`
	}
	d := json.NewDecoder(&b)
	d.DisallowUnknownFields()
	if err := d.Decode(&got); err != nil {
		t.Fatal(err)
	}
	if got.Version == nil || got.Problems == nil || got.Warnings == nil || len(got.Findings) != len(report.Findings) {
		t.Fatalf("incomplete: %+v", got)
	}
	levels := map[string]int{}
	for _, f := range got.Findings {
		levels[f.Level]++
		if f.What == "" || f.Detail == "" || (f.Level == levelOK) != (f.Remedy == "") {
			t.Errorf("got %+v, want all of it, and a remedy unless it is all right", f)
		}
	}
	if levels[levelProblem] != *got.Problems || levels[levelWarning] != *got.Warnings ||
		levels[levelOK]+levels[levelProblem]+levels[levelWarning] != len(got.Findings) {
		t.Errorf("counts: got %v, %d problems and %d warnings", levels, *got.Problems, *got.Warnings)
	}
}

// The lines of the file are named, all of them.
func TestCheckNamesLines(t *testing.T) {
	s := newScene(t)
	s.toml = "port = 1\n\nprot = 2\nidle_timeout = 30\n[server]\nport = 3\n"
	report := s.check()
	wantFindings(t, &report, []wanted{
		{levelProblem, "configuration", `line 3: unknown key "prot"`, ""},
		{levelProblem, "configuration", "line 4: idle_timeout: ", ""},
		{levelProblem, "configuration", `line 5: unknown key "server"`, ""},
	})
}

// A service that runs is no problem: its lock, its sockets and its journal are
// what they should be, and it is not disturbed.
func TestCheckBesideTheService(t *testing.T) {
	s := newScene(t)
	image := random(1, 1<<20)
	vdi := s.addVDI(image, xapitest.VDISpec{})
	socket := filepath.Join(s.dir, "nbd.sock")
	p := s.start("--state-dir="+s.state, "--listen=unix:"+socket)
	conn, err := s.open(p, s.export(vdi), true)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	s.args = []string{"--listen=" + p.addr}
	s.facts.openFiles = proc.OpenFileLimit
	report := s.check()
	wantFindings(t, &report, nil)
	for what, detail := range map[string]string{
		"service": "running, process", "journal": "1 VBD, which the running service sees to", "open files": "the running service",
	} {
		if f := report.found(what); len(f) != 1 || !strings.Contains(f[0].Detail, detail) {
			t.Errorf("%s: got %+v, want %q", what, f, detail)
		}
	}
	for _, f := range report.found("address") {
		if !strings.Contains(f.Detail, "is listened on by the running service") {
			t.Errorf("got %+v", f)
		}
	}
	got := make([]byte, len(image))
	if _, err := conn.ReadAt(got, 0); err != nil || !bytes.Equal(got, image) {
		t.Errorf("read beside check: %v", err)
	}
}

// A look leaves everything as it was.
func TestCheckChangesNothing(t *testing.T) {
	s := newScene(t)
	s.must(os.Remove(s.state))
	stale := filepath.Join(s.dir, "nbd.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	s.must(err)
	l.SetUnlinkOnClose(false)
	s.must(l.Close())
	tagVBD(s)
	vbds, sessions := len(s.host.VBDs()), s.host.Sessions()
	s.check()
	if _, err := os.Stat(s.state); err == nil {
		t.Error("the state folder was made")
	}
	if st, err := os.Lstat(stale); err != nil || st.Mode().Type() != fs.ModeSocket {
		t.Errorf("the stale socket: got %v, %v", st, err)
	}
	if got := len(s.host.VBDs()); got != vbds {
		t.Errorf("VBDs: got %d, want %d", got, vbds)
	}
	if got := s.host.Sessions(); got != sessions {
		t.Errorf("sessions in xapi: got %d, want %d", got, sessions)
	}
}

// Who is not root hears that, and nothing that would do harm.
func TestCheckAsAnotherUser(t *testing.T) {
	s := newScene(t)
	s.facts.uid = 1000
	report := s.check()
	if len(report.Findings) != 1 || report.Problems != 1 || report.Findings[0].What != "user" {
		t.Errorf("got\n%s", textOf(t, &report))
	}
}

func TestCheckCommand(t *testing.T) {
	requires.Root(t)
	s := newScene(t)
	s.writeCertificate()
	tests := []struct {
		name string
		args []string
		code int
		want string // on standard output
	}{
		// This machine may give reasons for warnings.
		{"fine", nil, 0, "\n0 problems, "},
		{"problem", []string{"--state-dir=" + s.file("file", "")}, exitProblems, "problem  state folder — "},
		{"JSON", []string{"--json"}, 0, `"problems": 0`},
		{"unknown flag", []string{"--nonsense"}, exitUsage, ""},
		{"argument", []string{"everything"}, exitUsage, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			args := append([]string{"check", "--config=" + s.file("xapi-nbd.toml", "")}, append(s.flags(), tt.args...)...)
			if code := run(t.Context(), args, &stdout, &stderr); code != tt.code {
				t.Errorf("exit code: got %d, want %d\n%s%s", code, tt.code, stdout.String(), stderr.String())
			}
			if !strings.Contains(stdout.String(), tt.want) {
				t.Errorf("got %q, want it to contain %q", stdout.String(), tt.want)
			}
		})
	}
}
