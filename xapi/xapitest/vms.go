package xapitest

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// vmObject is a guest VM of this host.
type vmObject struct {
	object
	metrics object
	name    string
	running bool
	started time.Time         // of the last start; the epoch before the first
	blocked map[string]string // blocked_operations: a reason by operation
}

// AddVM adds a halted VM with a VBD, in mode RW, for each of the VDIs, and returns the VM's
// uuid. Unlike that of VDISpec.VMName this VM can be started: VM.start and [Host.StartVM]
// attach its VBDs. Like xapi they do not look for VBDs of the control domain then, and the
// plug of such a VBD does not look for those of VMs.
//
// A VBD of a VM has a record, but no device, and VBDs and Wait do not list it. Tests make the
// VM's writes themselves, see WriteVDI.
func (h *Host) AddVM(nameLabel string, vdiUUIDs ...string) (uuid string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	vm := &vmObject{object: newObject(), metrics: newObject(), name: nameLabel, started: time.Unix(0, 0), blocked: map[string]string{}}
	h.vms[vm.ref] = vm
	for i, vdi := range vdiUUIDs {
		v := h.vdiByUUID(vdi)
		if v == nil {
			return "", fmt.Errorf("xapitest: no VDI %s", vdi)
		}
		if _, err := h.createVBD(vbdFields{
			vm: vm.ref, vdi: v.ref, userdevice: strconv.Itoa(i), mode: "RW", typ: "Disk", unpluggable: true,
		}); err != nil {
			return "", describe(err)
		}
	}
	return vm.uuid, nil
}

// StartVM is VM.start by another client of xapi.
func (h *Host) StartVM(uuid string) error { return h.onVM(uuid, h.startVM) }

// StopVM is VM.clean_shutdown by another client of xapi.
func (h *Host) StopVM(uuid string) error {
	return h.onVM(uuid, func(ref string) error { return h.stopVM(ref, "clean_shutdown") })
}

// UnblockVM removes all blocked operations of a VM, as another client of xapi may do.
func (h *Host) UnblockVM(uuid string) error {
	return h.onVM(uuid, func(ref string) error {
		clear(h.vms[ref].blocked)
		return nil
	})
}

func (h *Host) onVM(uuid string, run func(ref string) error) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	ref := h.vmRefByUUID(uuid)
	if ref == "" {
		return fmt.Errorf("xapitest: no VM %s", uuid)
	}
	return describe(run(ref))
}

// WriteVM writes to a disk of a running VM as its guest does, see WriteVDI. slot is the VBD's
// userdevice.
func (h *Host) WriteVM(uuid string, slot int, p []byte, off int64) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if vm := h.vms[h.vmRefByUUID(uuid)]; vm != nil && vm.running {
		for _, b := range h.vbdsOfVM(vm) {
			if b.slot == slot && b.attached {
				return h.vdis[b.vdi].write(p, off)
			}
		}
	}
	return fmt.Errorf("xapitest: VM %s has no disk %d, or does not run", uuid, slot)
}

// vmRefByUUID returns "" for an unknown uuid, and for the control domain's. h.mu is held.
func (h *Host) vmRefByUUID(uuid string) string {
	for ref, vm := range h.vms {
		if vm.uuid == uuid {
			return ref
		}
	}
	return ""
}

// startVM is VM.start; h.mu is held, and unlocked while it waits.
func (h *Host) startVM(ref string) error {
	vm, err := h.vmFor(ref, "start", "halted")
	if err != nil {
		return err
	}
	vm.running, vm.started = true, time.Now()
	for _, b := range h.vbdsOfVM(vm) {
		if err := h.attachToVM(b.ref, "attach"); err != nil {
			vm.running = false
			return err
		}
	}
	return nil
}

// stopVM is VM.clean_shutdown and VM.hard_shutdown; h.mu is held, and unlocked while it waits.
func (h *Host) stopVM(ref, operation string) error {
	vm, err := h.vmFor(ref, operation, "running")
	if err != nil {
		return err
	}
	for _, b := range h.vbdsOfVM(vm) {
		if err := h.unplug(b.ref, "unplug"); err != nil {
			return err
		}
	}
	vm.running = false
	return nil
}

// attachToVM attaches a VBD of a VM, by VM.start with the operation "attach", by VBD.plug with
// "plug". The storage layer refuses it while the control domain has the VDI attached read-only.
// h.mu is held, and unlocked while it waits.
func (h *Host) attachToVM(ref, operation string) error {
	b, end, err := h.begin(ref, operation)
	if err != nil {
		return err
	}
	defer end()
	v := h.vdis[b.vdi]
	switch {
	case !h.vms[b.vm].running:
		return fail("VM_BAD_POWER_STATE", b.vm, "running", "halted")
	case b.attached:
		return fail("DEVICE_ALREADY_ATTACHED", b.ref)
	case v == nil:
		return handleInvalid("VDI", b.vdi)
	case h.attachedMode(v) == "RO" && b.mode == "RW":
		return fail("INTERNAL_ERROR", "Storage_error ([S(Illegal_transition);[[S(Activated);S(RO)];[S(Activated);S(RW)]]])")
	}
	h.waitForWork(operation)
	b.attached = true
	h.happened(b, "plugged")
	return nil
}

// vmFor returns a VM for an operation that needs a power state, in the spelling of xapi's
// error. h.mu is held.
func (h *Host) vmFor(ref, operation, power string) (*vmObject, error) {
	vm := h.vms[ref]
	if vm == nil {
		return nil, handleInvalid("VM", ref)
	}
	if reason, blocked := vm.blocked[operation]; blocked {
		return nil, fail("OPERATION_BLOCKED", vm.ref, reason)
	}
	if now := map[bool]string{true: "running", false: "halted"}[vm.running]; now != power {
		return nil, fail("VM_BAD_POWER_STATE", vm.ref, power, now)
	}
	return vm, nil
}

func (h *Host) vbdsOfVM(vm *vmObject) (vbds []*vbdObject) {
	for _, b := range h.vbdOrder {
		if b.vm == vm.ref {
			vbds = append(vbds, b)
		}
	}
	return vbds
}

// ofVM reports whether a VBD belongs to a VM of AddVM. h.mu is held.
func (h *Host) ofVM(b *vbdObject) bool { return h.vms[b.vm] != nil }

func (vm *vmObject) record(h *Host) structure {
	power, resident := "Halted", nullRef
	if vm.running {
		power, resident = "Running", h.host.ref
	}
	vbds := array{}
	for _, b := range h.vbdsOfVM(vm) {
		vbds = append(vbds, b.ref)
	}
	return structure{
		{"uuid", vm.uuid},
		{"power_state", power},
		{"name_label", vm.name},
		{"name_description", ""},
		{"is_a_template", false},
		{"resident_on", resident},
		{"VBDs", vbds},
		{"blocked_operations", mapValue(vm.blocked)},
		{"current_operations", structure{}},
		{"other_config", structure{}},
		{"metrics", vm.metrics.ref},
		{"is_control_domain", false},
		{"is_a_snapshot", false},
	}
}

// guestMethods are the calls on VMs.
func guestMethods() []*method {
	act := func(name string, role Role, params []kind, do func(h *Host, c *call) error) *method {
		return &method{name: name, session: true, params: params, role: role, mutates: true,
			run: func(h *Host, c *call) (any, error) { return "", do(h, c) }}
	}
	stop := func(name string) *method {
		operation := strings.TrimPrefix(name, "VM.")
		return act(name, RoleVMOperator, []kind{text}, func(h *Host, c *call) error { return h.stopVM(c.text(0), operation) })
	}
	block := func(name string, params []kind, change func(blocked map[string]string, c *call) error) *method {
		return act(name, RoleVMAdmin, params, func(h *Host, c *call) error {
			vm := h.vms[c.text(0)]
			if vm == nil {
				return handleInvalid("VM", c.text(0))
			}
			return change(vm.blocked, c)
		})
	}
	ms := []*method{
		act("VM.start", RoleVMOperator, []kind{text, boolean, boolean}, func(h *Host, c *call) error { return h.startVM(c.text(0)) }),
		stop("VM.clean_shutdown"), stop("VM.hard_shutdown"),
		block("VM.add_to_blocked_operations", []kind{text, text, text}, func(blocked map[string]string, c *call) error {
			if _, found := blocked[c.text(1)]; found {
				return fail("MAP_DUPLICATE_KEY", "VM", "blocked_operations", c.text(0), c.text(1))
			}
			blocked[c.text(1)] = c.text(2)
			return nil
		}),
		block("VM.remove_from_blocked_operations", []kind{text, text}, func(blocked map[string]string, c *call) error {
			delete(blocked, c.text(1)) // a missing key is no error
			return nil
		}),
		{name: "VDI.create", session: true, params: []kind{strct}, role: RoleVMAdmin, mutates: true, run: createVDI},
	}
	return append(ms, recordMethods("VM_metrics", func(h *Host, ref string) structure {
		for _, vm := range h.vms {
			if vm.metrics.ref == ref {
				return structure{{"uuid", vm.metrics.uuid}, {"start_time", dateTimeOf(vm.started)}}
			}
		}
		return nil
	})...)
}

// createVDI is VDI.create: a raw VDI, which reads as zeroes. h.mu is held, and unlocked while
// it makes the file.
func createVDI(h *Host, c *call) (any, error) {
	s := c.args[0].(structure)
	member := func(name string) string {
		v, _ := s.get(name)
		text, _ := v.(string)
		return text
	}
	for _, name := range []string{"SR", "virtual_size", "type", "sharable", "read_only", "other_config"} {
		if _, found := s.get(name); !found {
			return nil, fail("INTERNAL_ERROR", fmt.Sprintf("Server_helpers.Dispatcher_FieldNotFound(%q)", name))
		}
	}
	size, err := strconv.ParseInt(member("virtual_size"), 10, 64)
	if err != nil {
		return nil, ocamlFailure("Int64.of_string")
	}
	i := slices.IndexFunc(h.srs(), func(sr *srObject) bool { return sr.ref == member("SR") })
	if i < 0 {
		return nil, handleInvalid("SR", member("SR"))
	}
	otherConfig, _ := s.get("other_config")
	spec := VDISpec{
		Size: size, SR: h.srs()[i].uuid, Type: member("type"),
		NameLabel: member("name_label"), Description: member("name_description"), OtherConfig: stringMapOf(otherConfig),
	}
	h.mu.Unlock()
	uuid, err := h.AddVDI(spec)
	h.mu.Lock()
	if err != nil {
		return nil, storageFailure(err)
	}
	return h.vdiByUUID(uuid).ref, nil
}
