package main

import (
	"errors"
	"regexp"
	"strings"
	"testing"

	"xapi-nbd/nbd/client"
	"xapi-nbd/xapi/xapitest"
)

// TestRefusalsAreLogged: every refusal, of GO or EXPORT_NAME, is one log line with the VDI, the
// peer, the rule and the remedy, and counts once.
func TestRefusalsAreLogged(t *testing.T) {
	tests := []struct {
		name    string
		rule    string
		prepare func(w *world, vdi string) (export string)
		want    string
		noVDI   bool
	}{
		{"clear-text client where TLS is required", "tls_required", func(w *world, vdi string) string {
			w.host.SetPurposes(w.network, "nbd")
			return w.export(vdi)
		}, "nbds:// instead of nbd://", false},
		{"contradictory networks", "tls_policy", func(w *world, vdi string) string {
			w.host.SetPurposes(w.network, "nbd", "insecure_nbd")
			return w.export(vdi)
		}, "contradictory", false},
		{"dead session", "session", func(w *world, vdi string) string {
			return w.host.ExportName(vdi, w.deadSession())
		}, "SESSION_INVALID", false},
		{"role", "permission", func(w *world, vdi string) string {
			return w.host.ExportName(vdi, w.session(xapitest.RoleReadOnly))
		}, "vm-admin", false},
		{"VDI in use", "plug_failed", func(w *world, vdi string) string {
			w.host.Fail("VBD.plug", "VDI_IN_USE", "OpaqueRef:some-vdi", "destroy")
			return w.export(vdi)
		}, "VDI_IN_USE", false},
		{"xapi hangs up", "xapi_unreachable", func(w *world, vdi string) string {
			w.host.DropConnection("session.get_record")
			return w.export(vdi)
		}, "systemctl status xapi", false},
		{"unencoded question mark", "malformed_name", func(_ *world, vdi string) string { return "/" + vdi }, "%3F", false},
		{"no name at all", "malformed_name", func(*world, string) string { return "" }, "VDI.get_nbd_info", true},
	}
	for _, tt := range tests {
		for _, byGo := range []bool{true, false} {
			t.Run(tt.name+map[bool]string{true: ", GO", false: ", EXPORT_NAME"}[byGo], func(t *testing.T) {
				w := newWorld(t, xapitest.Config{})
				vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
				p := w.start()
				export := tt.prepare(w, vdi)
				if byGo {
					var refused *client.Error
					if _, err := w.open(p, export, false); !errors.As(err, &refused) {
						t.Fatalf("got %v, want a refusal", err)
					}
				} else if _, answer := w.exportName(p, export); len(answer) != 0 {
					t.Fatalf("got %x, want the end of the connection", answer)
				}
				line := p.waitLine("rule=" + tt.rule)
				for _, want := range []string{"level=warning", "refused", `remote="127.0.0.1:`, "conn=", "remedy=", tt.want} {
					if !strings.Contains(line, want) {
						t.Errorf("the line lacks %s: %s", want, line)
					}
				}
				// GO follows options that name no export.
				if !tt.noVDI && (!byGo || tt.rule != "tls_required" && tt.rule != "tls_policy") && !strings.Contains(line, "export=/"+vdi) {
					t.Errorf("the line does not name the VDI: %s", line)
				}
				wantNothingTwice(t, line)
				w.waitClean(p)
				if n := w.report().Refused[tt.rule]; n != 1 {
					t.Errorf("%d refusals are counted, want 1", n)
				}
				p.stop(patience)
				lines := 0
				for line := range strings.Lines(p.output()) {
					if strings.Contains(line, "conn=1 ") && !strings.Contains(line, "level=debug") {
						lines++
					}
				}
				if lines != 1 {
					t.Errorf("%d lines about the client, want 1:\n%s", lines, p.output())
				}
			})
		}
	}
}

var reasonAndCause = regexp.MustCompile(`(reason|cause)="((?:[^"\\]|\\.)*)"`)

// wantNothingTwice expects that no part of a reason and its cause occurs again.
func wantNothingTwice(t *testing.T, line string) {
	t.Helper()
	seen := make(map[string]bool)
	for _, m := range reasonAndCause.FindAllStringSubmatch(line, -1) {
		for part := range strings.SplitSeq(m[2], ": ") {
			if seen[part] {
				t.Errorf("%q is said twice: %s", part, line)
			}
			seen[part] = true
		}
	}
}
