package xapitest

import (
	"context"
)

func vdiMethods() []*method {
	ms := []*method{
		byUUID("VDI", func(h *Host, uuid string) string {
			if v := h.vdiByUUID(uuid); v != nil {
				return v.ref
			}
			return ""
		}),
		{name: "VDI.get_nbd_info", session: true, params: []kind{text}, role: RoleVMAdmin, run: nbdInfo},
		{name: "VDI.data_destroy", session: true, params: []kind{text}, role: RoleVMAdmin, mutates: true,
			run: func(h *Host, c *call) (any, error) { return "", h.dataDestroy(c.text(0)) }},
	}
	ms = append(ms, cbtMethods()...)
	return append(ms, recordMethods("VDI", func(h *Host, ref string) structure {
		if v := h.vdis[ref]; v != nil {
			return h.vdiRecord(v)
		}
		return nil
	})...)
}

// unattachable are the types that VBD.create refuses, with the name that its
// error carries: one for display, not the enum's.
var unattachable = map[string]string{
	"cbt_metadata": "CBT metadata",
	"ha_statefile": "HA statefile",
	"redo_log":     "Redo log",
}

// nbdInfo returns one entry per network with a purpose, as if this host had one PIF there.
// The simulation has no certificate to return.
func nbdInfo(h *Host, c *call) (any, error) {
	v := h.vdis[c.text(0)]
	if v == nil {
		return nil, handleInvalid("VDI", c.text(0))
	}
	if v.Type == "cbt_metadata" {
		return nil, fail("VDI_INCOMPATIBLE_TYPE", v.ref, unattachable[v.Type])
	}
	infos := array{}
	for _, n := range h.networkOrder {
		if v.NoPBD || len(n.purposes) == 0 {
			continue
		}
		infos = append(infos, structure{
			{"exportname", h.ExportName(v.uuid, c.session.ref)},
			{"address", "127.0.0.1"},
			{"port", int64(10809)}, // always, even if the service has another port
			{"cert", ""},
			{"subject", "localhost"},
		})
	}
	return infos, nil
}

// dataDestroy implements VDI.data_destroy; h.mu is held, and unlocked while it waits. It
// changes the type at once, which prevents new VBDs, and waits a few seconds until the
// existing ones are unplugged and destroyed. It treats a raw VDI as a snapshot with changed
// block tracking. It deletes a VHD image; the file with the content stays.
func (h *Host) dataDestroy(ref string) error {
	v := h.vdis[ref]
	if v == nil {
		return handleInvalid("VDI", ref)
	}
	for v.operation != "" { // another data_destroy
		if !h.waitChange(h.ctx) {
			return errDropped
		}
	}
	if v.Type == "cbt_metadata" {
		return nil
	}
	if err := v.checkDataDestroy(); err != nil {
		return err
	}
	before := v.Type
	v.Type, v.operation, v.task = "cbt_metadata", "data_destroy", "OpaqueRef:"+newUUID()
	h.notify()
	defer func() {
		v.operation, v.task = "", ""
		h.notify()
	}()
	ctx, cancel := context.WithTimeout(h.ctx, h.cfg.DataDestroyWait)
	defer cancel()
	for len(h.vbdsOf(v)) > 0 {
		if h.waitChange(ctx) {
			continue
		}
		v.Type = before
		if h.ctx.Err() != nil {
			return errDropped
		}
		return fail("VDI_IN_USE", v.ref, "data_destroy")
	}
	if err := v.deleteImage(); err != nil {
		return storageFailure(err)
	}
	return nil
}

func (h *Host) vbdsOf(v *vdiObject) array {
	refs := array{}
	for _, b := range h.vbdOrder {
		if b.vdi == v.ref {
			refs = append(refs, b.ref)
		}
	}
	return refs
}

func (h *Host) vdiRecord(v *vdiObject) structure {
	current := structure{}
	if v.operation != "" {
		current = append(current, member{v.task, v.operation})
	}
	for _, b := range h.vbdOrder {
		if b.vdi == v.ref && b.operation != "" {
			current = append(current, member{b.task, b.operation})
		}
	}
	vbds := h.vbdsOf(v)
	if v.VMName != "" {
		vbds = append(array{v.guestVBD.ref}, vbds...)
	}
	return structure{
		{"uuid", v.uuid},
		{"name_label", v.NameLabel},
		{"name_description", v.Description},
		{"allowed_operations", array{"snapshot", "clone"}},
		{"current_operations", current},
		{"SR", v.sr.ref},
		{"VBDs", vbds},
		{"crash_dumps", array{}},
		{"virtual_size", v.size},
		{"physical_utilisation", v.size},
		{"type", v.Type},
		{"sharable", v.Sharable},
		{"read_only", v.ReadOnly},
		{"other_config", mapValue(v.OtherConfig)},
		{"storage_lock", false},
		{"location", v.uuid},
		{"managed", !v.Unmanaged},
		{"missing", v.Missing},
		{"parent", nullRef},
		{"xenstore_data", structure{}},
		{"sm_config", mapValue(h.smConfigOf(v))},
		{"is_a_snapshot", v.isSnapshot},
		{"snapshot_of", v.snapshotOfRef()},
		{"snapshots", h.snapshotsOf(v)},
		{"snapshot_time", dateTimeOf(v.takenAt())},
		{"tags", stringArray(v.Tags)},
		{"allow_caching", false},
		{"on_boot", "persist"},
		{"metadata_of_pool", nullRef},
		{"metadata_latest", false},
		{"is_tools_iso", false},
		{"cbt_enabled", v.tracksBlocks()},
	}
}
