package vdi

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"xapi-nbd/xapi"
)

func TestFrozen(t *testing.T) {
	dir := t.TempDir()
	missing, exists := filepath.Join(dir, "missing"), filepath.Join(dir, "exists")
	if err := os.WriteFile(exists, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	const here, there = "host_OpaqueRef:1", "host_OpaqueRef:2"
	type config = map[string]string
	tests := []struct {
		name     string
		sharable bool
		config   config
		file     string
		reason   string
	}{
		{"read-only here", false, config{here: "RO"}, missing, ""},
		{"read-only on two hosts", false, config{here: "RO", there: "RO"}, missing, ""},
		{"other keys do not matter", false, config{here: "RO", "vhd-parent": "x", "relinking": "true", "paused": "true", "activating": "True"}, missing, ""},
		{"writable here", false, config{here: "RW"}, missing, "writable"},
		{"writable elsewhere", false, config{here: "RO", there: "RW"}, missing, "writable"},
		{"a value that is not known", false, config{here: "RO", there: ""}, missing, "writable"},
		{"no keys", false, config{"vdi_type": "vhd"}, missing, "no_record"},
		{"no sm_config", false, nil, missing, "no_record"},
		{"sharable", true, config{here: "RO"}, missing, "sharable"},
		{"writers beside readers", false, config{here: "RO"}, exists, "unprotected"},
		{"the file cannot be looked for", false, config{here: "RO"}, filepath.Join(exists, "x"), "unprotected"},
	}
	for _, tt := range tests {
		reason, err := checkFrozen(xapi.VDIRecord{Sharable: tt.sharable, SMConfig: tt.config}, tt.file)
		if reason != tt.reason || (err == nil) != (reason == "") {
			t.Errorf("%s: got %q (%v), want %q", tt.name, reason, err, tt.reason)
		}
		if reason != "" && !slices.Contains(BlocksReasons, reason) {
			t.Errorf("%s: %q is not in BlocksReasons", tt.name, reason)
		}
	}
}
