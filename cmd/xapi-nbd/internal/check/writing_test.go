package check

import (
	"os"
	"path/filepath"
	"testing"
)

// Units in which block devices may be written, and others.
func TestMayWriteDevices(t *testing.T) {
	hardening, err := os.ReadFile("../../../../packaging/xapi-nbd.service.d/hardening.conf")
	if err != nil {
		t.Fatal(err)
	}
	write, err := os.ReadFile("../../../../packaging/xapi-nbd.service.d/write.conf")
	if err != nil {
		t.Fatal(err)
	}
	base, err := os.ReadFile("../../../../packaging/xapi-nbd.service")
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		unit string
		want bool
	}{
		"none":                {"", true},
		"packaged":            {string(base), true},
		"hardened":            {string(base) + string(hardening), false},
		"with the drop-in":    {string(base) + string(hardening) + string(write), true},
		"in the other order":  {string(base) + string(write) + string(hardening), true},
		"taken back":          {string(write) + "DeviceAllow=\nDeviceAllow=block-* r\n", false},
		"policy only":         {"DevicePolicy=closed\n", false},
		"policy auto":         {"DevicePolicy=closed\nDevicePolicy=auto\n", true},
		"characters":          {"DeviceAllow=char-* rw\n", false},
		"all kinds of access": {"DeviceAllow = block-*\n", true},
		"commented":           {"DevicePolicy=closed\n#DeviceAllow=block-* rw\n", false},
	} {
		if got := mayWriteDevices(tt.unit); got != tt.want {
			t.Errorf("%s: got %t, want %t", name, got, tt.want)
		}
	}
}

// The strongest unit counts, and each name of a drop-in once, in the order of the names.
func TestUnitText(t *testing.T) {
	dir := t.TempDir()
	etc, lib := filepath.Join(dir, "etc"), filepath.Join(dir, "lib")
	for path, text := range map[string]string{
		etc + "/xapi-nbd.service":          "unit of etc",
		lib + "/xapi-nbd.service":          "unit of lib",
		lib + "/xapi-nbd.service.d/b.conf": "b of lib",
		etc + "/xapi-nbd.service.d/b.conf": "b of etc",
		lib + "/xapi-nbd.service.d/a.conf": "a of lib",
		etc + "/xapi-nbd.service.d/c":      "no drop-in",
		etc + "/xapi-nbd.service.d/d.conf": "d of etc",
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got := unitText([]string{etc, filepath.Join(dir, "run"), lib})
	if want := "unit of etc\na of lib\nb of etc\nd of etc"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
