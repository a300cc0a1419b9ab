package xapitest

import (
	"strconv"
	"testing"
)

// TestVM starts and stops a VM while the control domain has its disk attached read-write,
// which xapi does not prevent.
func TestVM(t *testing.T) {
	h := start(t, Config{})
	s := h.NewSession(RoleVMAdmin)
	disk := addVDI(t, h, VDISpec{})
	uuid, err := h.AddVM("web", disk)
	if err != nil {
		t.Fatal(err)
	}
	vm := mustString(t, h, "VM.get_by_uuid", s, uuid)
	vbds := must(t, h, "VM.get_VBDs", s, vm).(array)
	if len(vbds) != 1 {
		t.Fatalf("VBDs: %v", vbds)
	}
	vbd := vbds[0].(string)
	mustFail(t, h, []string{"VM_BAD_POWER_STATE", vm, "running", "halted"}, "VM.clean_shutdown", s, vm)
	mustFail(t, h, []string{"VM_BAD_POWER_STATE", vm, "running", "halted"}, "VBD.plug", s, vbd)

	must(t, h, "VM.add_to_blocked_operations", s, vm, "start", "copying")
	mustFail(t, h, []string{"MAP_DUPLICATE_KEY", "VM", "blocked_operations", vm, "start"}, "VM.add_to_blocked_operations", s, vm, "start", "")
	mustFail(t, h, []string{"OPERATION_BLOCKED", vm, "copying"}, "VM.start", s, vm, false, false)
	must(t, h, "VM.remove_from_blocked_operations", s, vm, "start")
	must(t, h, "VM.remove_from_blocked_operations", s, vm, "start")

	metrics := mustString(t, h, "VM.get_metrics", s, vm)
	if got := must(t, h, "VM_metrics.get_start_time", s, metrics); got != dateTime("19700101T00:00:00Z") {
		t.Errorf("start time before the first start: %v", got)
	}
	st := vbdStruct(t, h, s, disk)
	st["mode"] = "RW"
	dom0 := mustString(t, h, "VBD.create", s, st)
	must(t, h, "VBD.plug", s, dom0)
	must(t, h, "VM.start", s, vm, false, false)
	if got := must(t, h, "VM_metrics.get_start_time", s, metrics); got == dateTime("19700101T00:00:00Z") {
		t.Errorf("start time after a start: %v", got)
	}
	mustFail(t, h, []string{"VM_BAD_POWER_STATE", vm, "halted", "running"}, "VM.start", s, vm, false, false)
	if got := must(t, h, "VBD.get_currently_attached", s, vbd); got != true {
		t.Errorf("currently_attached of the VM's VBD: %v", got)
	}
	if got := must(t, h, "VDI.get_VBDs", s, mustString(t, h, "VDI.get_by_uuid", s, disk)).(array); len(got) != 2 {
		t.Errorf("VBDs of the VDI: %v, want both", got)
	}
	if got := h.VBDs(); len(got) != 1 || got[0].Ref != dom0 {
		t.Errorf("VBDs of the control domain: %+v", got)
	}
	must(t, h, "VBD.unplug", s, dom0)
	must(t, h, "VBD.plug", s, dom0)
	if err := h.WriteVM(uuid, 0, make([]byte, 512), 0); err != nil {
		t.Error(err)
	}
	if err := h.StopVM(uuid); err != nil {
		t.Error(err)
	}
	if got := mustString(t, h, "VM.get_power_state", s, vm); got != "Halted" {
		t.Errorf("power state: %s", got)
	}
	if got := must(t, h, "VBD.get_currently_attached", s, vbd); got != false {
		t.Errorf("currently_attached of the halted VM's VBD: %v", got)
	}
	wantError(t, "a write of a halted VM", h.WriteVM(uuid, 0, make([]byte, 512), 0), "has no disk 0")

	// While the start attaches a disk, its VBD has an operation.
	reached, release := h.BlockWork("attach")
	started := make(chan error, 1)
	go func() { started <- h.StartVM(uuid) }()
	<-reached
	if got := must(t, h, "VBD.get_current_operations", s, vbd).(structure); len(got) != 1 || got[0].value != "attach" {
		t.Errorf("operations during the start: %v", got)
	}
	release()
	if err := <-started; err != nil {
		t.Error(err)
	}
}

// TestVMBesideReader: the storage layer lets no VM write a disk that the control domain has
// attached read-only.
func TestVMBesideReader(t *testing.T) {
	h := start(t, Config{})
	disk := addVDI(t, h, VDISpec{})
	uuid, err := h.AddVM("web", disk)
	if err != nil {
		t.Fatal(err)
	}
	vbd := plugOf(t, h, disk)
	wantError(t, "a start beside a reader", h.StartVM(uuid), "INTERNAL_ERROR")
	for _, err := range []error{h.UnplugVBD(t.Context(), vbd.UUID), h.StartVM(uuid)} {
		if err != nil {
			t.Error(err)
		}
	}
}

func TestVMOfAnother(t *testing.T) {
	h := start(t, Config{})
	uuid, err := h.AddVM("web")
	if err != nil {
		t.Fatal(err)
	}
	s := h.NewSession(RoleVMAdmin)
	vm := mustString(t, h, "VM.get_by_uuid", s, uuid)
	must(t, h, "VM.add_to_blocked_operations", s, vm, "start", "copying")
	wantError(t, "a blocked start", h.StartVM(uuid), "OPERATION_BLOCKED")
	for _, err := range []error{h.UnblockVM(uuid), h.StartVM(uuid), h.StopVM(uuid)} {
		if err != nil {
			t.Error(err)
		}
	}
	wantError(t, "an unknown VM", h.StartVM(h.ControlDomainUUID()), "no VM")
	if _, err := h.AddVM("mail", "none"); err == nil {
		t.Error("a VM with an unknown VDI: got no error")
	}
}

// TestCreateVDI creates a disk for a VM, as clients that restore do.
func TestCreateVDI(t *testing.T) {
	h := start(t, Config{})
	s := h.NewSession(RoleVMAdmin)
	st := map[string]any{
		"name_label": "root", "name_description": "", "SR": h.sr.ref, "virtual_size": strconv.Itoa(4 << 20), "type": "user",
		"sharable": false, "read_only": false, "other_config": map[string]any{"copy": "1"},
	}
	vdi := mustString(t, h, "VDI.create", s, st)
	if got := must(t, h, "VDI.get_virtual_size", s, vdi); got != "4194304" {
		t.Errorf("size: %v", got)
	}
	if got := must(t, h, "VDI.get_other_config", s, vdi).(structure); len(got) != 1 {
		t.Errorf("other_config: %v", got)
	}
	uuid, err := h.AddVM("web")
	if err != nil {
		t.Fatal(err)
	}
	vbd := vbdStruct(t, h, s, mustString(t, h, "VDI.get_uuid", s, vdi))
	vbd["VM"], vbd["mode"], vbd["userdevice"] = mustString(t, h, "VM.get_by_uuid", s, uuid), "RW", "0"
	must(t, h, "VBD.create", s, vbd)
	mustFail(t, h, []string{"DEVICE_ALREADY_EXISTS", "0"}, "VBD.create", s, vbd)
	must(t, h, "VM.start", s, vbd["VM"], false, false)

	st["SR"] = "OpaqueRef:none"
	mustFail(t, h, []string{"HANDLE_INVALID", "SR", "OpaqueRef:none"}, "VDI.create", s, st)
	delete(st, "type")
	mustFail(t, h, []string{"INTERNAL_ERROR", `Server_helpers.Dispatcher_FieldNotFound("type")`}, "VDI.create", s, st)
}
