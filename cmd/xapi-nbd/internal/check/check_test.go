package check

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"xapi-nbd/vdi"
	"xapi-nbd/xapi"
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
func wantFindings(t *testing.T, report *Report, want []wanted) {
	t.Helper()
	matches := func(f Finding, w wanted) bool {
		return f.Level == w.level && f.What == w.what && strings.Contains(f.Detail, w.detail) && strings.Contains(f.Remedy, w.remedy)
	}
	for _, w := range want {
		if !slices.ContainsFunc(report.Findings, func(f Finding) bool { return matches(f, w) }) {
			t.Errorf("not found: %+v", w)
		}
	}
	for _, f := range report.Findings {
		if f.Level != LevelOK && !slices.ContainsFunc(want, func(w wanted) bool { return matches(f, w) }) {
			t.Errorf("found, and not wanted: %+v", f)
		}
	}
	if t.Failed() {
		t.Logf("the report:\n%s", textOf(t, report))
	}
}

func textOf(t *testing.T, report *Report) string {
	t.Helper()
	var b strings.Builder
	if err := report.Text(&b); err != nil {
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
func wantSchema(t *testing.T, report *Report) {
	t.Helper()
	var b bytes.Buffer
	if err := report.JSON(&b); err != nil {
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
		if f.What == "" || f.Detail == "" || (f.Level == LevelOK) != (f.Remedy == "") {
			t.Errorf("got %+v, want all of it, and a remedy unless it is all right", f)
		}
	}
	if levels[LevelProblem] != *got.Problems || levels[LevelWarning] != *got.Warnings ||
		levels[LevelOK]+levels[LevelProblem]+levels[LevelWarning] != len(got.Findings) {
		t.Errorf("counts: got %v, %d problems and %d warnings", levels, *got.Problems, *got.Warnings)
	}
}

// The lines of the file are named, all of them.
func TestCheckNamesLines(t *testing.T) {
	s := newScene(t)
	s.toml = "port = 1\n\nprot = 2\nidle_timeout = 30\n[server]\nport = 3\n"
	report := s.check()
	wantFindings(t, &report, []wanted{
		{LevelProblem, "configuration", `line 3: unknown key "prot"`, ""},
		{LevelProblem, "configuration", "line 4: idle_timeout: ", ""},
		{LevelProblem, "configuration", `line 5: unknown key "server"`, ""},
	})
}

// check reports an inventory exactly if the service refuses it.
func TestCheckReadsTheInventoryAsTheService(t *testing.T) {
	s := newScene(t)
	good := "CONTROL_DOMAIN_UUID='" + s.host.ControlDomainUUID() + "'\nINSTALLATION_UUID='" + s.host.InstallationUUID() + "'\n"
	client := xapi.New(xapi.Config{Socket: s.host.Socket()})
	defer client.Close()
	for _, tt := range []struct {
		name, text string
		fine       bool
	}{
		{"as xapi writes it", good, true},
		{"without quotes", strings.ReplaceAll(good, "'", ""), true},
		{"blank before the uuid", strings.ReplaceAll(good, "='", "=' "), true},
		{"blank behind the quote", strings.Replace(good, "'\n", "' \n", 1), false},
		{"blank before the quote", strings.ReplaceAll(good, "='", "= '"), false},
		{"one quote", strings.ReplaceAll(good, "'\n", "\n"), false},
		{"two pairs of quotes", strings.ReplaceAll(good, "'", "''"), false},
		{"the last line counts", good + "INSTALLATION_UUID=''\n", false},
	} {
		s.inventory(func(string) string { return tt.text })
		disks, err := vdi.Open(vdi.Config{
			Client: client, StateDir: t.TempDir(), DeviceDir: s.host.DeviceDir(), Inventory: s.host.Inventory(), MaxVBDs: 1,
		})
		if err != nil {
			t.Fatal(err)
		}
		_, err = disks.Recover(t.Context())
		if refused := errors.Is(err, vdi.ErrInventory); refused == tt.fine || err != nil && !refused {
			t.Errorf("%s: the service: got %v, want it to be accepted: %v", tt.name, err, tt.fine)
		}
		if err := disks.Close(t.Context()); err != nil {
			t.Error(err)
		}
		report := s.check()
		findings := report.found("inventory")
		if len(findings) == 0 || (findings[0].Level == LevelOK) != tt.fine {
			t.Errorf("%s: check: got %+v, want it to be accepted: %v", tt.name, findings, tt.fine)
		}
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
	s.facts.UID = 1000
	report := s.check()
	if len(report.Findings) != 1 || report.Problems != 1 || report.Findings[0].What != "user" {
		t.Errorf("got\n%s", textOf(t, &report))
	}
}
