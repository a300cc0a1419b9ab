package xapitest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
)

func inUse(pid int) []string {
	return []string{"SR_BACKEND_FAILURE_46", "", fmt.Sprintf("The VDI is not available [opterr=device is in use (opened by pid %d)]", pid), ""}
}

func TestVBDLife(t *testing.T) {
	for style, want := range map[DeviceStyle]string{StyleXVD: "xvda", StyleNBD: "nbd0", StyleSM: "sm/backend/SR/VDI"} {
		t.Run(want, func(t *testing.T) {
			h := start(t, Config{Style: style})
			s := h.NewSession(RoleVMAdmin)
			uuid := addVDI(t, h, VDISpec{})
			ref := createVBD(t, h, s, uuid)
			vbdUUID := mustString(t, h, "VBD.get_uuid", s, ref)
			if got := mustString(t, h, "VBD.get_device", s, ref); got != "" {
				t.Errorf("device before plug: got %q, want none", got)
			}
			mustFail(t, h, []string{"DEVICE_ALREADY_DETACHED", ref}, "VBD.unplug", s, ref)
			if got := must(t, h, "VBD.plug", s, ref); got != "" {
				t.Errorf("plug: got %v, want an empty string", got)
			}
			mustFail(t, h, []string{"DEVICE_ALREADY_ATTACHED", ref}, "VBD.plug", s, ref)
			mustFail(t, h, []string{"OPERATION_NOT_ALLOWED", "VBD '" + vbdUUID + "' still attached to '" + h.ControlDomainUUID() + "'"}, "VBD.destroy", s, ref)

			want := strings.NewReplacer("SR", h.sr.uuid, "VDI", uuid).Replace(want)
			if got := mustString(t, h, "VBD.get_device", s, ref); got != want {
				t.Errorf("device: got %q, want %q", got, want)
			}
			link := filepath.Join(h.DeviceDir(), want)
			if target, err := os.Readlink(link); err != nil || target != h.ImagePath(uuid) {
				t.Errorf("link: got %q, %v, want %q", target, err, h.ImagePath(uuid))
			}
			must(t, h, "VBD.unplug", s, ref)
			if _, err := os.Lstat(link); !os.IsNotExist(err) {
				t.Errorf("link after unplug: got %v, want that it does not exist", err)
			}
			if got := h.VBDs()[0]; got.Device != want || got.CurrentlyAttached || got.OtherConfig["owner"] != "test" || got.VDI != uuid {
				t.Errorf("after unplug: got %+v, want detached, the device text kept", got)
			}
			must(t, h, "VBD.destroy", s, ref)
			mustFail(t, h, []string{"HANDLE_INVALID", "VBD", ref}, "VBD.unplug_force", s, ref)
			mustFail(t, h, []string{"UUID_INVALID", "VBD", vbdUUID}, "VBD.get_by_uuid", s, vbdUUID)

			var changes []string
			for _, e := range h.Events() {
				changes = append(changes, e.Change)
			}
			if want := []string{"created", "plugged", "unplugged", "destroyed"}; !slices.Equal(changes, want) {
				t.Errorf("events: got %q, want %q", changes, want)
			}
			h.ResetEvents()
			if got := h.Events(); len(got) != 0 {
				t.Errorf("events after reset: got %v", got)
			}
		})
	}
}

func TestPlugRefusals(t *testing.T) {
	h := start(t, Config{})
	s := h.NewSession(RoleRoot)
	plugged := func(spec VDISpec) (vbd, vdi string) {
		uuid := addVDI(t, h, spec)
		return createVBD(t, h, s, uuid), mustString(t, h, "VDI.get_by_uuid", s, uuid)
	}
	vbd, _ := plugged(VDISpec{Unmanaged: true, NoPBD: true})
	mustFail(t, h, []string{"VDI_NOT_MANAGED", vbd}, "VBD.plug", s, vbd)
	vbd, _ = plugged(VDISpec{NoPBD: true, Missing: true})
	mustFail(t, h, []string{"SR_HAS_NO_PBDS", h.unpluggedSR.ref}, "VBD.plug", s, vbd)
	vbd, vdi := plugged(VDISpec{Missing: true})
	mustFail(t, h, []string{"VDI_MISSING", h.sr.ref, vdi}, "VBD.plug", s, vbd)

	for typ, display := range unattachable {
		uuid := addVDI(t, h, VDISpec{Type: typ})
		st := vbdStruct(t, h, s, uuid)
		mustFail(t, h, []string{"VDI_INCOMPATIBLE_TYPE", st["VDI"].(string), display}, "VBD.create", s, st)
	}
	st := vbdStruct(t, h, s, addVDI(t, h, VDISpec{ReadOnly: true}))
	st["mode"] = "rw"
	mustFail(t, h, []string{"VDI_READONLY", st["VDI"].(string)}, "VBD.create", s, st)
}

func TestSlots(t *testing.T) {
	h := start(t, Config{})
	s := h.NewSession(RoleRoot)
	uuid := addVDI(t, h, VDISpec{})
	st := vbdStruct(t, h, s, uuid)
	st["userdevice"] = "1"
	must(t, h, "VBD.create", s, st)
	mustFail(t, h, []string{"DEVICE_ALREADY_EXISTS", "1"}, "VBD.create", s, st)
	st["userdevice"] = "autodetect"
	for i := range slots - 1 {
		if i == 25 {
			st["userdevice"] = "xvdaa" // 26, as 1 is taken
		}
		ref := mustString(t, h, "VBD.create", s, st)
		want := i
		if i > 0 {
			want++
		}
		if got := mustString(t, h, "VBD.get_userdevice", s, ref); got != strconv.Itoa(want) {
			t.Fatalf("VBD %d: got userdevice %s, want %d", i, got, want)
		}
		st["userdevice"] = "autodetect"
	}
	mustFail(t, h, []string{"INVALID_DEVICE", "autodetect"}, "VBD.create", s, st)
	if got := xvdName(255); got != "xvdiv" {
		t.Errorf("slot 255: got %s, want xvdiv", got)
	}
}

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

func TestForeign(t *testing.T) {
	h := start(t, Config{Style: StyleNBD})
	uuid := addVDI(t, h, VDISpec{})
	vbd, err := h.AddForeignVBD(uuid, map[string]string{"a": "b"})
	if err != nil {
		t.Fatal(err)
	}
	if err := h.PlugForeign(vbd); err != nil {
		t.Fatal(err)
	}
	if got := h.VBDs()[0]; !got.Foreign || !got.CurrentlyAttached || got.OtherConfig["a"] != "b" || got.UUID != vbd {
		t.Errorf("got %+v", got)
	}
	if err := h.PlugForeign(vbd); err == nil {
		t.Error("plugging twice: got no error")
	}
}

func TestConcurrentLives(t *testing.T) {
	h := start(t, Config{Style: StyleNBD})
	s := h.NewSession(RoleVMAdmin)
	uuid := addVDI(t, h, VDISpec{})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			ref := createVBD(t, h, s, uuid)
			must(t, h, "VBD.plug", s, ref)
			must(t, h, "VBD.unplug", s, ref)
			must(t, h, "VBD.destroy", s, ref)
		})
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	err := h.Wait(ctx, func(vbds []VBD) bool { return len(vbds) == 0 && len(h.Events()) == 32 })
	wg.Wait()
	if err != nil {
		t.Errorf("waiting for 8 lives: %v", err)
	}
}
