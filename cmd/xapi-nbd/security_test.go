package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/cmd/xapi-nbd/internal/service"
)

// TestSecurityNamesTheLimits: docs/SECURITY.md has the limits of peers. These are settings and
// limits of this package; package nbd tests its own.
func TestSecurityNamesTheLimits(t *testing.T) {
	text, err := os.ReadFile("../../docs/SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	seconds := func(d config.Duration) string { return fmt.Sprintf("%d s", time.Duration(d)/time.Second) }
	d := config.Default()
	for name, want := range map[string]string{
		"handshake_timeout":     seconds(d.HandshakeTimeout),
		"max_connections":       strconv.Itoa(d.MaxConnections),
		"max_vbds":              strconv.Itoa(d.MaxVBDs),
		"attach_timeout":        seconds(d.AttachTimeout),
		"max_inflight_bytes":    fmt.Sprintf("%d MiB", d.MaxInflightBytes>>20),
		"first_request_timeout": seconds(d.FirstRequestTimeout),
		"idle_timeout":          fmt.Sprintf("%d h", time.Duration(d.IdleTimeout)/time.Hour),
		"PurposeTTL":            seconds(config.Duration(service.PurposeTTL)),
	} {
		found := false
		for row := range strings.Lines(string(text)) {
			cells := strings.Split(row, " | ")
			if len(cells) != 3 || !strings.Contains(cells[2], "`"+name+"`") {
				continue
			}
			found = true
			if !strings.Contains(" "+strings.NewReplacer(",", " ", ";", " ").Replace(cells[1])+" ", " "+want+" ") {
				t.Errorf("%s: %q does not say %s", name, cells[1], want)
			}
		}
		if !found {
			t.Errorf("there is no row about %s", name)
		}
	}
	if want := fmt.Sprintf("every %d minutes\n(`session_recheck`)", time.Duration(d.SessionRecheck)/time.Minute); !strings.Contains(string(text), want) {
		t.Errorf("it does not say %q", want)
	}
}
