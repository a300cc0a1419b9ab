package vdi

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestParseInventory(t *testing.T) {
	const dom0, self = "11111111-2222-3333-4444-555555555555", "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
	good := "CONTROL_DOMAIN_UUID='" + dom0 + "'\nINSTALLATION_UUID='" + self + "'\n"
	tests := []struct {
		name, text, err string
	}{
		{"as xapi writes it", good, ""},
		{"other lines", "# comment\nBUILD_NUMBER='x=y'\n" + good + "no equals sign\n", ""},
		{"CRLF and blanks", strings.ReplaceAll(strings.ReplaceAll(good, "\n", "\r\n"), "='", "=' "), ""},
		{"without quotes", strings.ReplaceAll(good, "'", ""), ""},
		{"the last one wins", "INSTALLATION_UUID='wrong'\n" + good, ""},
		{"half written", good[:30], "CONTROL_DOMAIN_UUID"},
		{"key missing", strings.Split(good, "\n")[0], "INSTALLATION_UUID"},
		{"no uuid", strings.ReplaceAll(good, "-", "_"), "no valid"},
		{"double quotes are not stripped", strings.ReplaceAll(good, "'", `"`), "no valid"},
		{"blank behind the quote", strings.Replace(good, dom0+"'", dom0+"' ", 1), "CONTROL_DOMAIN_UUID"},
		{"empty", "", "no valid"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "inventory")
			if err := os.WriteFile(path, []byte(tt.text), 0o600); err != nil {
				t.Fatal(err)
			}
			h, err := parseInventory(path)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("got error %v, want one about %s", err, tt.err)
				}
				return
			}
			if want := (Host{ControlDomain: dom0, Installation: self}); err != nil || h != want {
				t.Errorf("got %+v, %v, want %+v", h, err, want)
			}
		})
	}
}

// xapi rewrites the file in place. If a key is missing the file is read again.
func TestReadInventoryRetries(t *testing.T) {
	path := filepath.Join(t.TempDir(), "inventory")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readInventory(t.Context(), path); err == nil {
		t.Error("an empty inventory was accepted")
	}
	if _, err := readInventory(t.Context(), path+".missing"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing file: got %v", err)
	}
}
