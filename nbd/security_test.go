package nbd

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"xapi-nbd/nbd/wire"
)

// TestSecurityNamesTheLimits: docs/SECURITY.md has the limits of peers in this package.
func TestSecurityNamesTheLimits(t *testing.T) {
	text, err := os.ReadFile("../docs/SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []string{
		fmt.Sprintf("connections in the handshake | %d; .*`MaxHandshakes`", defaults.MaxHandshakes),
		fmt.Sprintf("%d; .*`MaxHandshakesPerHost`", defaults.MaxHandshakesPerHost),
		fmt.Sprintf("%d | `MaxOptions`", defaults.MaxOptions),
		fmt.Sprintf("%d MiB | `MaxHandshakeBytes`", defaults.MaxHandshakeBytes>>20),
		fmt.Sprintf("one option in memory | %d KiB; up to %d KiB is skipped", maxOptionData>>10, maxSkippedData>>10),
		fmt.Sprintf("in flight | %d; .*`MaxInflight`", defaults.MaxInflight),
		fmt.Sprintf("one request | %d MiB | `DefaultMaxPayload`", wire.DefaultMaxPayload>>20),
		fmt.Sprintf("extents in one answer | %d,%03d ", maxExtents/1000, maxExtents%1000),
		fmt.Sprintf("does not take its answer | %.0f s, ", defaults.WriteTimeout.Seconds()),
	} {
		pattern := strings.ReplaceAll(row, "|", `\|`)
		if !regexp.MustCompile(pattern).Match(text) {
			t.Errorf("there is no row like %s", row)
		}
	}
}
