package check

import (
	"errors"
	"strings"
	"testing"

	"xapi-nbd/vdi"
	"xapi-nbd/xapi"
)

// TestCheckReadsTheInventoryAsTheService: check reports an inventory if and only if the service
// refuses it.
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
