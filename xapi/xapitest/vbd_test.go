package xapitest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

func inUse(pid int) []string {
	return []string{"SR_BACKEND_FAILURE_46", "", fmt.Sprintf("The VDI is not available [opterr=device is in use (opened by pid %d)]", pid), ""}
}

func TestVBDStates(t *testing.T) {
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

func TestConcurrentVBDs(t *testing.T) {
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
		t.Errorf("waiting for 8 VBDs: %v", err)
	}
}
