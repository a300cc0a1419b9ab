package xapitest

import (
	"strconv"
	"testing"
)

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
