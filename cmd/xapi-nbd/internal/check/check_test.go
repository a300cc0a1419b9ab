package check

import (
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"testing"
)

// TestCheckFindsNothing: there are no findings about the scene without an injected fault.
func TestCheckFindsNothing(t *testing.T) {
	s := newScene(t)
	report := s.check()
	if report.Problems != 0 || report.Warnings != 0 {
		t.Errorf("got\n%s", textOf(t, &report))
	}
	for _, subject := range []string{
		"configuration", "service", "state folder", "inventory", "certificate", "certificate time", "certificate names",
		"xapi socket", "xapi login", "host", "control domain", "network purposes", "journal", "device folder", "address",
		"open files", "pipes", "kernel",
	} {
		if len(report.found(subject)) != 1 {
			t.Errorf("%s: got %+v, want one finding", subject, report.found(subject))
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

// TestCheckFindsAllFaults: one problem does not hide others.
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

// TestCheckNamesLines: the findings name the lines of all mistakes of the file.
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

// TestCheckChangesNothing: a check changes no files and no VBDs.
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

// TestCheckAsAnotherUser: for a user other than root there is one finding, and no wrong advice.
func TestCheckAsAnotherUser(t *testing.T) {
	s := newScene(t)
	s.facts.UID = 1000
	report := s.check()
	if len(report.Findings) != 1 || report.Problems != 1 || report.Findings[0].Subject != "user" {
		t.Errorf("got\n%s", textOf(t, &report))
	}
}
