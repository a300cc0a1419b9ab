package xapitest

import (
	"os"
	"testing"
	"time"

	"xapi-nbd/test/leaks"
)

// patience is for how long a test waits before it calls the host stuck.
const patience = 30 * time.Second

func TestMain(m *testing.M) { leaks.Main(m) }

// start makes a host in a short directory: a socket's path has little room.
func start(t *testing.T, cfg Config) *Host {
	t.Helper()
	if cfg.Dir == "" {
		dir, err := os.MkdirTemp("", "xapi")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.RemoveAll(dir) })
		cfg.Dir = dir
	}
	h, err := Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Errorf("closing the host: %v", err)
		}
	})
	return h
}

func addVDI(t *testing.T, h *Host, spec VDISpec) (uuid string) {
	t.Helper()
	if spec.Size == 0 && spec.Image == "" {
		spec.Size = 1 << 20
	}
	uuid, err := h.AddVDI(spec)
	if err != nil {
		t.Fatal(err)
	}
	return uuid
}

func vbdStruct(t *testing.T, h *Host, session, vdiUUID string) map[string]any {
	t.Helper()
	return map[string]any{
		"VM":         mustString(t, h, "VM.get_by_uuid", session, h.ControlDomainUUID()),
		"VDI":        mustString(t, h, "VDI.get_by_uuid", session, vdiUUID),
		"userdevice": "autodetect", "bootable": false, "mode": "RO", "type": "Disk", "empty": false,
		"other_config": map[string]any{"owner": "test"}, "qos_algorithm_type": "", "qos_algorithm_params": map[string]any{},
	}
}

func createVBD(t *testing.T, h *Host, session, vdiUUID string) (ref string) {
	t.Helper()
	return mustString(t, h, "VBD.create", session, vbdStruct(t, h, session, vdiUUID))
}
