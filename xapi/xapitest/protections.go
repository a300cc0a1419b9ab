package xapitest

import "fmt"

// ChangeVDI changes the record of a VDI, as other clients of xapi and the storage manager do,
// also while it is attached. Only the fields Type, Unmanaged, Missing, ReadOnly, Sharable,
// NameLabel, Description, Tags and OtherConfig have an effect.
func (h *Host) ChangeVDI(uuid string, change func(*VDISpec)) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := h.vdiByUUID(uuid)
	if v == nil {
		return fmt.Errorf("xapitest: no VDI %s", uuid)
	}
	change(&v.VDISpec)
	h.notify()
	return nil
}

// MarkSnapshot makes a VDI a snapshot of another one in its record, without a chain of images.
// xapi leaves read_only false for snapshots, and so does this.
func (h *Host) MarkSnapshot(uuid string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := h.vdiByUUID(uuid)
	if v == nil {
		return fmt.Errorf("xapitest: no VDI %s", uuid)
	}
	v.isSnapshot = true
	h.notify()
	return nil
}

// HoldVDIOperation puts an operation of another client, such as "snapshot" or "copy", into
// the current_operations of a VDI until end is called. It does not keep VBDs from being
// plugged: xapi makes their callers wait, or lets them pass, by the kind of the operation.
func (h *Host) HoldVDIOperation(uuid, operation string) (end func(), err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := h.vdiByUUID(uuid)
	if v == nil {
		return nil, fmt.Errorf("xapitest: no VDI %s", uuid)
	}
	v.operation, v.task = operation, "OpaqueRef:"+newUUID()
	h.notify()
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		v.operation, v.task = "", ""
		h.notify()
	}, nil
}
