package xapitest

import "fmt"

// srObject is a storage repository.
type srObject struct {
	object
	typ  string
	busy bool // a storage operation is in progress; others on the SR wait
}

func newSR(typ string) srObject { return srObject{object: newObject(), typ: typ} }

// tracksBlocks reports whether the SR has changed block tracking (VDI_CONFIG_CBT).
func (s *srObject) tracksBlocks() bool {
	switch s.typ {
	case "ext", "nfs", "smb", "file", "lvm", "lvmoiscsi", "lvmohba", "xfs", "zfs", "largeblock":
		return true
	}
	return false
}

// AddSR adds an SR of a type, such as "nfs", and returns its uuid for VDISpec.SR. The
// host has an SR of the type "ext" from the start.
func (h *Host) AddSR(typ string) (uuid string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := newSR(typ)
	h.moreSRs = append(h.moreSRs, &s)
	return s.uuid
}

// srs returns all SRs. h.mu is held.
func (h *Host) srs() []*srObject { return append([]*srObject{&h.sr, &h.unpluggedSR}, h.moreSRs...) }

// srByUUID returns the SR of a VDISpec, and the first one for "". h.mu is held.
func (h *Host) srByUUID(uuid string) (*srObject, error) {
	for _, s := range h.srs() {
		if uuid == "" || s.uuid == uuid {
			return s, nil
		}
	}
	return nil, fmt.Errorf("no SR %s", uuid)
}

func srMethods() []*method {
	ms := []*method{
		byUUID("SR", func(h *Host, uuid string) string {
			if s, err := h.srByUUID(uuid); err == nil && uuid != "" {
				return s.ref
			}
			return ""
		}),
		getAll("SR", func(h *Host) array {
			refs := array{}
			for _, s := range h.srs() {
				refs = append(refs, s.ref)
			}
			return refs
		}),
	}
	return append(ms, recordMethods("SR", func(h *Host, ref string) structure {
		for _, s := range h.srs() {
			if s.ref == ref {
				return h.srRecord(s)
			}
		}
		return nil
	})...)
}

func (h *Host) srRecord(s *srObject) structure {
	vdis := array{}
	for _, v := range h.vdis {
		if v.sr == s {
			vdis = append(vdis, v.ref)
		}
	}
	return structure{
		{"uuid", s.uuid},
		{"name_label", "Simulated storage"},
		{"name_description", ""},
		{"allowed_operations", array{}},
		{"current_operations", structure{}},
		{"VDIs", vdis},
		{"type", s.typ},
		{"content_type", "user"},
		{"shared", false},
		{"other_config", structure{}},
		{"tags", array{}},
		{"sm_config", structure{}},
		{"local_cache_enabled", false},
		{"is_tools_sr", false},
		{"clustered", false},
	}
}

// cbtMethods are the calls that snapshots and changed block tracking need.
func cbtMethods() []*method {
	act := func(name string, do func(h *Host, ref string) error) *method {
		return &method{name: "VDI." + name, session: true, params: []kind{text}, role: RoleVMAdmin, mutates: true,
			run: func(h *Host, c *call) (any, error) { return "", do(h, c.text(0)) }}
	}
	return []*method{
		act("enable_cbt", func(h *Host, ref string) error { return h.configureCBT(ref, true) }),
		act("disable_cbt", func(h *Host, ref string) error { return h.configureCBT(ref, false) }),
		act("destroy", (*Host).destroyVDI),
		{name: "VDI.snapshot", session: true, params: []kind{text}, optional: []kind{stringMap}, role: RoleVMAdmin, mutates: true,
			run: func(h *Host, c *call) (any, error) {
				s, err := h.snapshotVDI(c.text(0))
				if err != nil {
					return nil, err
				}
				return s.ref, nil
			}},
		{name: "VDI.list_changed_blocks", session: true, params: []kind{text, text}, role: RoleVMOperator,
			run: func(h *Host, c *call) (any, error) { return h.listChangedBlocks(c.text(0), c.text(1)) }},
	}
}
