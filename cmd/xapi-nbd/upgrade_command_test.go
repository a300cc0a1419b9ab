package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"xapi-nbd/cmd/xapi-nbd/internal/control"
)

// upgradeCommand runs the command on the world's state folder.
func (w *upgradeWorld) upgradeCommand(ctx context.Context, more ...string) (code int, out, errOut string) {
	var o, e bytes.Buffer
	code = run(ctx, append([]string{"upgrade", "--state-dir=" + filepath.Join(w.dir, "state")}, more...), &o, &e)
	return code, o.String(), e.String()
}

// TestUpgradeCodes: the package restarts the service only for exit code 1, which a service
// that may have transfers never causes.
func TestUpgradeCodes(t *testing.T) {
	w := newUpgradeWorld(t, 64<<10)
	conn := w.mustOpen(w.p, w.vdi)
	want := func(what string, code int, text string, more ...string) {
		t.Helper()
		got, out, errOut := w.upgradeCommand(t.Context(), more...)
		if got != code || !strings.Contains(errOut, text) {
			t.Errorf("%s: got exit code %d, %q, %q, want %d and %q", what, got, out, errOut, code, text)
		}
		if _, err := conn.ReadAt(make([]byte, 512), 0); err != nil {
			t.Errorf("%s: the transfer: %v", what, err)
		}
	}
	broken := w.file("broken.toml", "speed = 1\n")
	want("settings of the command", exitUsage, `line 1: unknown key "speed"`, "--config="+broken)
	w.installScript("exit 3\n")
	want("broken program", exitNotUpgraded, "not upgraded, the old process goes on: the new process has ended")
	socket := filepath.Join(w.dir, "state", control.SocketName)
	if err := os.Rename(socket, socket+".hidden"); err != nil {
		t.Fatal(err)
	}
	want("no control socket", exitNotUpgraded, fmt.Sprintf("not upgraded: process %d (", w.p.cmd.Process.Pid))
	if err := os.Rename(socket+".hidden", socket); err != nil {
		t.Fatal(err)
	}
	w.stopAll(w.p.cmd.Process.Pid)
	if code, _, errOut := w.upgradeCommand(t.Context()); code != exitFailed || !strings.Contains(errOut, "no running service was found") {
		t.Errorf("without a service: got exit code %d, %q", code, errOut)
	}
}

// TestUpgradeAnswerIsLost: when the old process dies the command looks which process serves.
func TestUpgradeAnswerIsLost(t *testing.T) {
	for _, another := range []bool{false, true} {
		t.Run(fmt.Sprintf("another process %v", another), func(t *testing.T) {
			w := newUpgradeWorld(t, 64<<10)
			release := w.host.Block("session.login_with_password")
			defer release()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			type result struct {
				code        int
				out, errOut string
			}
			ended := make(chan result, 1)
			go func() {
				code, out, errOut := w.upgradeCommand(ctx)
				ended <- result{code, out, errOut}
			}()
			w.p.waitLine("msg=upgrading")
			if err := w.p.cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			release()
			want := result{exitNotUpgraded, "", "xapi-nbd: it is not known whether the service was upgraded, and no process answers now: "}
			if another {
				w.p = w.start()
				want = result{0, fmt.Sprintf("Process %d, version ", w.p.cmd.Process.Pid), ""}
			} else {
				w.waitProcesses()
				cancel()
			}
			if r := <-ended; r.code != want.code || !strings.HasPrefix(r.out, want.out) || !strings.HasPrefix(r.errOut, want.errOut) {
				t.Errorf("got %+v, want %+v", r, want)
			}
		})
	}
}
