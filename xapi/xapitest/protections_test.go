package xapitest

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

// createRW is VBD.create with mode RW.
func createRW(t *testing.T, h *Host, session, vdiUUID string) (ref string) {
	t.Helper()
	st := vbdStruct(t, h, session, vdiUUID)
	st["mode"] = "RW"
	return mustString(t, h, "VBD.create", session, st)
}

// xapi protects a read-only VDI from VBDs with mode RW, and a snapshot not.
func TestProtections(t *testing.T) {
	h := start(t, Config{})
	s := h.NewSession(RoleVMAdmin)
	readOnly := addVDI(t, h, VDISpec{})
	if err := h.ChangeVDI(readOnly, func(s *VDISpec) { s.ReadOnly = true }); err != nil {
		t.Fatal(err)
	}
	st := vbdStruct(t, h, s, readOnly)
	st["mode"] = "RW"
	mustFail(t, h, []string{"VDI_READONLY", mustString(t, h, "VDI.get_by_uuid", s, readOnly)}, "VBD.create", s, st)
	snapshot := addVDI(t, h, VDISpec{})
	if err := h.MarkSnapshot(snapshot); err != nil {
		t.Fatal(err)
	}
	if got := must(t, h, "VDI.get_is_a_snapshot", s, mustString(t, h, "VDI.get_by_uuid", s, snapshot)); got != true {
		t.Errorf("is_a_snapshot: %v", got)
	}
	must(t, h, "VBD.plug", s, createRW(t, h, s, snapshot))
	if vbds := h.VBDs(); len(vbds) != 1 || vbds[0].Mode != "RW" || !vbds[0].CurrentlyAttached {
		t.Errorf("got VBDs %+v, want that of the snapshot", vbds)
	}
}

// The device of a VBD with mode RW can be written.
func TestWritableLoopDevice(t *testing.T) {
	requireLoop(t)
	for _, style := range []DeviceStyle{StyleXVD, StyleNBD, StyleSM} {
		h := start(t, Config{Style: style, Loop: true})
		s := h.NewSession(RoleVMAdmin)
		disk := addVDI(t, h, VDISpec{})
		ref := createRW(t, h, s, disk)
		must(t, h, "VBD.plug", s, ref)
		f, err := os.OpenFile(filepath.Join(h.DeviceDir(), h.VBDs()[0].Device), os.O_RDWR|os.O_SYNC|os.O_EXCL, 0)
		if err != nil {
			t.Fatal(err)
		}
		data := bytes.Repeat([]byte("x"), 4096)
		_, err = f.WriteAt(data, 8192)
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		if err != nil {
			t.Fatal(err)
		}
		image, err := os.ReadFile(h.ImagePath(disk))
		if err != nil || !bytes.Equal(image[8192:][:4096], data) {
			t.Errorf("style %v: the image does not have what was written: %v", style, err)
		}
		must(t, h, "VBD.unplug", s, ref)
	}
}

// An operation of another client is in the record of the VDI until it ends.
func TestHoldVDIOperation(t *testing.T) {
	h := start(t, Config{})
	s := h.NewSession(RoleReadOnly)
	disk := addVDI(t, h, VDISpec{})
	ref := mustString(t, h, "VDI.get_by_uuid", s, disk)
	end, err := h.HoldVDIOperation(disk, "snapshot")
	if err != nil {
		t.Fatal(err)
	}
	if got := must(t, h, "VDI.get_current_operations", s, ref).(structure); len(got) != 1 || got[0].value != "snapshot" {
		t.Errorf("got operations %v, want the snapshot", got)
	}
	end()
	if got := must(t, h, "VDI.get_current_operations", s, ref).(structure); len(got) != 0 {
		t.Errorf("got operations %v after the end", got)
	}
}
