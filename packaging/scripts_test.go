package packaging

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestScripts runs the scripts of the packages as dpkg and rpm do, on a system that systemd
// has booted.
func TestScripts(t *testing.T) {
	const booted = "systemd-notify --booted"
	fresh := []string{"systemctl enable xapi-nbd.path", booted, "systemctl daemon-reload", "systemctl start xapi-nbd.path"}
	upgrade := []string{booted, "systemctl daemon-reload", "systemctl is-active --quiet xapi-nbd.service", "xapi-nbd upgrade"}
	remove := []string{booted, "systemctl stop xapi-nbd.path xapi-nbd.socket xapi-nbd.service",
		"xapi-nbd status --end-replaced", "systemctl disable xapi-nbd.path xapi-nbd.socket xapi-nbd.service"}
	removed := []string{booted, "systemctl daemon-reload"}
	tests := []struct {
		script, args string
		want         []string
	}{
		{"postinstall", "1", fresh},
		{"postinstall", "2", upgrade},
		{"postinstall", "configure 0.0.1-1", upgrade},
		{"postinstall", "abort-upgrade 0.0.1-1", nil},
		{"preremove", "0", remove},
		{"preremove", "1", nil}, // rpm upgrades: the new one restarts it
		{"preremove", "remove", remove},
		{"preremove", "upgrade 0.2.0-1", nil},
		{"postremove", "0", removed},
		{"postremove", "1", nil},
		{"postremove", "remove", removed},
		{"postremove", "upgrade 0.2.0-1", nil},
	}
	for _, tt := range tests {
		t.Run(tt.script+" "+tt.args, func(t *testing.T) {
			f := newFakes(t, "systemctl=logged", "systemd-notify=logged", "xapi-nbd=logged")
			args := append([]string{"scripts/" + tt.script + ".sh"}, strings.Fields(tt.args)...)
			mustRun(t, f.env(), filepath.Join(f.path, "sh"), args...)
			if diff := cmp.Diff(tt.want, f.log()); diff != "" {
				t.Errorf("want -, got +\n%s", diff)
			}
		})
	}
}

// A service that is too old to upgrade is restarted. One whose new program does not work
// goes on: a restart would end its transfers and serve nobody. One that is stopped stays so.
func TestScriptsWhenUpgradeFails(t *testing.T) {
	const restart = "systemctl try-restart xapi-nbd.service"
	for _, tt := range []struct {
		fails, code string
		want        []string
		says        string
	}{
		{"xapi-nbd", "1", []string{"xapi-nbd upgrade", restart}, ""},
		{"xapi-nbd", "2", []string{"xapi-nbd upgrade"}, "the service was not restarted"},
		{"xapi-nbd", "6", []string{"xapi-nbd upgrade"}, "the service was not restarted"},
		{"xapi-nbd", "127", []string{"xapi-nbd upgrade"}, "the service was not restarted"},
		{"systemctl", "3", nil, ""},
	} {
		t.Run(tt.fails+" "+tt.code, func(t *testing.T) {
			f := newFakes(t, "systemctl=logged", "systemd-notify=logged", "xapi-nbd=logged")
			f.learn(tt.fails+".fails", tt.code)
			if tt.fails == "systemctl" {
				f.learn("systemctl.fails.only", "is-active")
			}
			r := runIn(t, f.env(), filepath.Join(f.path, "sh"), "scripts/postinstall.sh", "configure", "0.1.0-1")
			log := f.log()
			if r.code != 0 || !strings.Contains(r.stderr, tt.says) {
				t.Errorf("got exit code %d and %q, want 0 and %q", r.code, r.stderr, tt.says)
			}
			want := append([]string{"systemd-notify --booted", "systemctl daemon-reload", "systemctl is-active --quiet xapi-nbd.service"}, tt.want...)
			if diff := cmp.Diff(want, log); diff != "" {
				t.Errorf("want -, got +\n%s", diff)
			}
		})
	}
}

// Nothing is started or stopped in a chroot, nor without systemd.
func TestScriptsWithoutSystemd(t *testing.T) {
	f := newFakes(t, "systemctl=logged", "systemd-notify=logged")
	f.learn("systemd-notify.fails", "")
	none := newFakes(t)
	for _, call := range []string{"postinstall 1", "postinstall 2", "preremove 0", "postremove 0"} {
		script, arg, _ := strings.Cut(call, " ")
		mustRun(t, f.env(), filepath.Join(f.path, "sh"), "scripts/"+script+".sh", arg)
		for _, line := range f.log() {
			for _, verb := range []string{" start ", " stop ", "restart", "reload"} {
				if strings.Contains(line, verb) {
					t.Errorf("%s in a chroot: %s", call, line)
				}
			}
		}
		mustRun(t, none.env(), filepath.Join(none.path, "sh"), "scripts/"+script+".sh", arg)
	}
}

// A Debian package that was removed and comes back is enabled again, although
// dpkg tells its postinst of the old version; one that is upgraded is not.
func TestScriptsKnowUpgrades(t *testing.T) {
	f := newFakes(t, "systemctl=logged")
	root := t.TempDir()
	call := func(script string, args ...string) {
		t.Helper()
		mustRun(t, f.env("DPKG_ROOT="+root), filepath.Join(f.path, "sh"), append([]string{"scripts/" + script + ".sh"}, args...)...)
	}
	call("preinstall", "install", "0.1.0-1")
	call("postinstall", "configure", "0.1.0-1")
	if diff := cmp.Diff([]string{"systemctl --root=" + root + " enable xapi-nbd.path"}, f.log()); diff != "" {
		t.Errorf("coming back: want -, got +\n%s", diff)
	}
	if _, err := os.Stat(filepath.Join(root, "var/lib/xapi-nbd")); !os.IsNotExist(err) {
		t.Errorf("the state folder was left behind: %v", err)
	}
	call("preinstall", "upgrade", "0.1.0-1")
	call("postinstall", "configure", "0.1.0-1")
	if log := f.log(); log != nil {
		t.Errorf("upgrade: got %q, want nothing", log)
	}
}

// A purge does not forget VBDs that are still to be cleaned up.
func TestPurgeKeepsAJournal(t *testing.T) {
	f := newFakes(t)
	root := t.TempDir()
	state := filepath.Join(root, "var/lib/xapi-nbd")
	journal := filepath.Join(state, "VBDs_to_clean_up")
	purge := func() string {
		t.Helper()
		r := runIn(t, f.env("DPKG_ROOT="+root), filepath.Join(f.path, "sh"), "scripts/postremove.sh", "purge")
		if r.code != 0 {
			t.Fatalf("exit code %d: %s", r.code, r.stderr)
		}
		return r.stderr
	}
	if err := os.MkdirAll(state, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(journal, []byte("6f1c5a5e-0000-4000-8000-000000000001\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if said := purge(); !strings.Contains(said, "not cleaned up") {
		t.Errorf("got %q, want a word about the VBDs", said)
	}
	if _, err := os.Stat(journal); err != nil {
		t.Errorf("the journal is gone: %v", err)
	}
	if err := os.Truncate(journal, 0); err != nil {
		t.Fatal(err)
	}
	purge()
	if _, err := os.Stat(state); !os.IsNotExist(err) {
		t.Errorf("the state folder is still there: %v", err)
	}
}
