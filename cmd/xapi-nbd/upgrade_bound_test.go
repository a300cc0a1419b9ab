package main

import (
	"fmt"
	"strings"
	"testing"

	"xapi-nbd/cmd/xapi-nbd/internal/control"
)

// TestTooManyReplaced: an upgrade is refused while three processes that were replaced serve
// connections, and those that have none do not count.
func TestTooManyReplaced(t *testing.T) {
	w := newUpgradeWorld(t, 64<<10)
	first := w.mustOpen(w.p, w.vdi)
	var last control.UpgradeReport
	for i := range 3 {
		conn := first
		if i > 0 {
			conn = w.mustOpen(w.p, w.vdi)
		}
		if _, err := conn.ReadAt(make([]byte, 512), 0); err != nil {
			t.Fatal(err)
		}
		last = w.upgrade()
	}
	const text = "3 processes that earlier upgrades have replaced still serve connections"
	if report, err := w.tryUpgrade(); err != nil || !strings.Contains(report.Error, text) {
		t.Errorf("got %+v, %v, want %q", report, err, text)
	}
	w.readsAsNewClient(w.p, w.vdi)
	if r := w.report(); r.PID != last.PID || len(r.Replaced) != 3 {
		t.Errorf("status: got process %d with %d that it has replaced, want %d with 3", r.PID, len(r.Replaced), last.PID)
	}
	first.Close()
	eventually(t, func() string {
		if n := len(w.processes()); n != 3 {
			return fmt.Sprintf("processes: got %d, want 3", n)
		}
		return ""
	})
	last = w.upgrade()
	w.stopAll(last.PID)
}
