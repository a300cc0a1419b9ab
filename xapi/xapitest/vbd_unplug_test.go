package xapitest

import (
	"os"
	"path/filepath"
	"testing"
)

func TestUnplugWhileOpenFile(t *testing.T) {
	h := start(t, Config{})
	testUnplugWhileOpen(t, h, addVDI(t, h, VDISpec{}))
}

// testUnplugWhileOpen leaves a detached VBD.
func testUnplugWhileOpen(t *testing.T, h *Host, uuid string) {
	t.Helper()
	s := h.NewSession(RoleRoot)
	ref := createVBD(t, h, s, uuid)
	must(t, h, "VBD.plug", s, ref)
	f, err := os.Open(filepath.Join(h.DeviceDir(), h.VBDs()[0].Device))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	mustFail(t, h, inUse(os.Getpid()), "VBD.unplug", s, ref)
	mustFail(t, h, inUse(os.Getpid()), "VBD.unplug_force", s, ref)
	if !h.VBDs()[0].CurrentlyAttached {
		t.Error("the VBD is detached after a refused unplug")
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	must(t, h, "VBD.unplug", s, ref)
}

func TestSharedDevices(t *testing.T) {
	h := start(t, Config{Style: StyleSM})
	s := h.NewSession(RoleRoot)
	uuid := addVDI(t, h, VDISpec{})
	first, second := createVBD(t, h, s, uuid), createVBD(t, h, s, uuid)
	must(t, h, "VBD.plug", s, first)
	must(t, h, "VBD.plug", s, second)
	f, err := os.Open(filepath.Join(h.DeviceDir(), h.VBDs()[1].Device))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	must(t, h, "VBD.unplug", s, first)
	mustFail(t, h, inUse(os.Getpid()), "VBD.unplug", s, second)
	_ = f.Close()
	must(t, h, "VBD.unplug", s, second)
}
