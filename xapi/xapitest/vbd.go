package xapitest

import (
	"errors"
	"slices"
	"strconv"
	"strings"
)

// slots is how many userdevice numbers the control domain has.
const slots = 256

// vbdFields are the members of the structure that VBD.create takes.
type vbdFields struct {
	vm, vdi, userdevice, mode, typ string
	bootable, unpluggable, empty   bool
	otherConfig, qosParams         map[string]string
	qosType                        string
}

type vbdObject struct {
	object
	vbdFields
	slot     int
	device   string // keeps its text after unplug
	attached bool
	foreign  bool
	// operation is the one in progress, task its task's ref; both empty if none.
	operation, task string
}

// createVBD makes the record only: no storage work, no check of the VDI's SR.
// The order of checks is xapi's. h.mu is held.
func (h *Host) createVBD(f vbdFields) (*vbdObject, error) {
	if f.vm != h.dom0.ref && h.vms[f.vm] == nil {
		return nil, handleInvalid("VM", f.vm)
	}
	v := h.vdis[f.vdi]
	switch {
	case f.empty && f.typ == "CD":
		f.vdi = nullRef
	case v == nil && !f.empty:
		return nil, handleInvalid("VDI", f.vdi)
	case v != nil && unattachable[v.Type] != "":
		return nil, fail("VDI_INCOMPATIBLE_TYPE", v.ref, unattachable[v.Type])
	}
	switch {
	case f.typ == "CD" && f.mode != "RO":
		return nil, fail("VBD_CDS_MUST_BE_READONLY")
	case f.typ != "CD" && f.empty:
		return nil, fail("VBD_NOT_REMOVABLE_MEDIA", "in constructor")
	case v != nil && v.ReadOnly && f.mode == "RW":
		return nil, fail("VDI_READONLY", v.ref)
	}
	slot, err := h.slot(f.vm, f.userdevice)
	if err != nil {
		return nil, err
	}
	f.userdevice = strconv.Itoa(slot)
	b := &vbdObject{object: newObject(), vbdFields: f, slot: slot}
	h.vbds[b.ref] = b
	h.vbdOrder = append(h.vbdOrder, b)
	h.happened(b, "created")
	return b, nil
}

// slot resolves a userdevice of the VM with the ref vm. Slots are shared by all VBDs of the
// VM, attached or not; those that MoveToOtherVM has moved still have one of the control domain.
func (h *Host) slot(vm, userdevice string) (int, error) {
	used := map[int]bool{}
	for _, b := range h.vbdOrder {
		if b.vm == vm || vm == h.dom0.ref && !h.ofVM(b) {
			used[b.slot] = true
		}
	}
	if userdevice == "autodetect" {
		for n := range slots {
			if !used[n] {
				return n, nil
			}
		}
		return 0, fail("INVALID_DEVICE", userdevice)
	}
	n, ok := slotNumber(userdevice)
	switch {
	case !ok:
		return 0, fail("INVALID_DEVICE", userdevice)
	case used[n]:
		return 0, fail("DEVICE_ALREADY_EXISTS", userdevice)
	}
	return n, nil
}

func slotNumber(userdevice string) (int, bool) {
	for n := range slots {
		if userdevice == strconv.Itoa(n) || userdevice == xvdName(n) {
			return n, true
		}
	}
	return 0, false
}

// xvdName is "xvd" and the slot in letters: 0 is a, 25 z, 26 aa.
func xvdName(slot int) string {
	letters := ""
	for n := slot + 1; n > 0; n = (n - 1) / 26 {
		letters = string(rune('a'+(n-1)%26)) + letters
	}
	return "xvd" + letters
}

// begin finds a VBD and marks it and its VDI as being worked on. While another
// operation has the mark it waits, as xapi does for up to two hours, instead
// of failing with OTHER_OPERATION_IN_PROGRESS. h.mu is held, and unlocked while it waits.
func (h *Host) begin(ref, operation string) (b *vbdObject, end func(), err error) {
	for {
		b = h.vbds[ref]
		if b == nil {
			return nil, nil, handleInvalid("VBD", ref)
		}
		v := h.vdis[b.vdi]
		if b.operation == "" && (v == nil || !v.busy) {
			b.operation, b.task = operation, "OpaqueRef:"+newUUID()
			if v != nil {
				v.busy = true
			}
			return b, func() {
				b.operation, b.task = "", ""
				if v != nil {
					v.busy = false
				}
				h.notify()
			}, nil
		}
		if !h.waitChange(h.ctx) {
			return nil, nil, errDropped
		}
	}
}

// plug is VBD.plug; h.mu is held.
func (h *Host) plug(ref string) error {
	if b := h.vbds[ref]; b != nil && h.ofVM(b) {
		return h.attachToVM(ref, "plug")
	}
	b, end, err := h.begin(ref, "plug")
	if err != nil {
		return err
	}
	defer end()
	v := h.vdis[b.vdi]
	switch {
	case b.attached:
		return fail("DEVICE_ALREADY_ATTACHED", b.ref)
	case v == nil:
		return handleInvalid("VDI", b.vdi)
	case v.Unmanaged:
		return fail("VDI_NOT_MANAGED", b.ref) // the VBD's ref, though the VDI is meant
	case v.NoPBD:
		return fail("SR_HAS_NO_PBDS", v.sr.ref)
	case v.Missing:
		return fail("VDI_MISSING", v.sr.ref, v.ref)
	}
	h.waitForWork("plug")
	d, err := h.activate(b, v)
	if err != nil {
		if h.ctx.Err() != nil {
			return errDropped
		}
		return storageFailure(err)
	}
	b.device, b.attached = d.name, true
	h.happened(b, "plugged")
	return nil
}

// unplug is VBD.unplug and VBD.unplug_force; h.mu is held.
func (h *Host) unplug(ref, operation string) error {
	b, end, err := h.begin(ref, operation)
	if err != nil {
		return err
	}
	defer end()
	v := h.vdis[b.vdi]
	switch {
	case !b.attached:
		return fail("DEVICE_ALREADY_DETACHED", b.ref)
	case !b.unpluggable && operation == "unplug":
		return fail("VBD_NOT_UNPLUGGABLE", b.ref)
	case v != nil && v.Unmanaged:
		return fail("VDI_NOT_MANAGED", b.ref)
	}
	h.waitForWork("unplug")
	if err := h.detachDevice(b.device); err != nil {
		if h.ctx.Err() != nil {
			return errDropped
		}
		return storageFailure(err)
	}
	b.attached = false
	if v != nil {
		if err := h.unlink(v); err != nil {
			return storageFailure(err)
		}
	}
	h.happened(b, "unplugged")
	return nil
}

// storageFailure is how an error of the storage manager reaches the API.
func storageFailure(err error) error {
	var helper helperError
	if errors.As(err, &helper) {
		return fail("INTERNAL_ERROR", "Subprocess exited with unexpected code 1; stdout = [  ]; stderr = [ "+string(helper)+" ]")
	}
	text := strings.ReplaceAll(err.Error(), "\n", "; ")
	return fail("SR_BACKEND_FAILURE_46", "", "The VDI is not available [opterr="+text+"]", "")
}

// destroy is VBD.destroy; h.mu is held.
func (h *Host) destroy(ref string) error {
	b, end, err := h.begin(ref, "destroy")
	if err != nil {
		return err
	}
	defer end()
	if b.attached {
		return fail("OPERATION_NOT_ALLOWED", "VBD '"+b.uuid+"' still attached to '"+h.dom0.uuid+"'")
	}
	delete(h.vbds, b.ref)
	h.vbdOrder = slices.DeleteFunc(h.vbdOrder, func(o *vbdObject) bool { return o == b })
	h.happened(b, "destroyed")
	return nil
}
