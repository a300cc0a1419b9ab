package xapitest

import "cmp"

// vmMethods are the getters of VMs, the host and the pool.
func vmMethods() []*method {
	findDom0, _ := single(func(h *Host) object { return h.dom0 })
	findVM := func(h *Host, uuid string) string { return cmp.Or(findDom0(h, uuid), h.vmRefByUUID(uuid)) }
	findHost, isHost := single(func(h *Host) object { return h.host })
	findPool, isPool := single(func(h *Host) object { return h.pool })
	guarded := func(is func(*Host, string) bool, record func(*Host) structure) func(*Host, string) structure {
		return func(h *Host, ref string) structure {
			if !is(h, ref) {
				return nil
			}
			return record(h)
		}
	}
	ms := []*method{
		byUUID("VM", findVM), byUUID("host", findHost), byUUID("pool", findPool),
		getAll("pool", func(h *Host) array { return array{h.pool.ref} }),
		getAll("host", func(h *Host) array { return array{h.host.ref} }),
	}
	ms = append(ms, recordMethods("VM", (*Host).anyVMRecord)...)
	ms = append(ms, recordMethods("host", guarded(isHost, (*Host).hostRecord))...)
	return append(ms, recordMethods("pool", guarded(isPool, (*Host).poolRecord))...)
}

// vmRecord is the part of the control domain's record that has to do with its
// VBDs; the real one has some 80 members.
func (h *Host) vmRecord() structure {
	vbds := array{}
	for _, b := range h.vbdOrder {
		if b.vm == h.dom0.ref {
			vbds = append(vbds, b.ref)
		}
	}
	return structure{
		{"uuid", h.dom0.uuid},
		{"power_state", "Running"},
		{"name_label", "Control domain on host: simulated"},
		{"name_description", "The domain which manages physical devices and manages other domains"},
		{"is_a_template", false},
		{"resident_on", h.host.ref},
		{"affinity", h.host.ref},
		{"VBDs", vbds},
		{"blocked_operations", structure{}},
		{"metrics", nullRef},
		{"other_config", structure{}},
		{"domid", int64(0)},
		{"is_control_domain", true},
		{"is_a_snapshot", false},
	}
}

// anyVMRecord is the record of the control domain or of a guest, nil for other refs.
func (h *Host) anyVMRecord(ref string) structure {
	if ref == h.dom0.ref {
		return h.vmRecord()
	}
	if vm := h.vms[ref]; vm != nil {
		return vm.record(h)
	}
	for _, v := range h.vdis {
		if v.VMName != "" && v.guest.ref == ref {
			return structure{
				{"uuid", v.guest.uuid}, {"name_label", v.VMName}, {"power_state", "Running"},
				{"is_control_domain", false}, {"VBDs", array{v.guestVBD.ref}},
			}
		}
	}
	return nil
}

// guestVBDRecord is the record of the VBD of a guest, nil for other refs.
func (h *Host) guestVBDRecord(ref string) structure {
	for _, v := range h.vdis {
		if v.VMName != "" && v.guestVBD.ref == ref {
			return structure{{"uuid", v.guestVBD.uuid}, {"VM", v.guest.ref}, {"VDI", v.ref}, {"mode", "RW"}}
		}
	}
	return nil
}

func (h *Host) hostRecord() structure {
	return structure{
		{"uuid", h.host.uuid},
		{"name_label", "simulated"},
		{"hostname", "simulated"},
		{"enabled", true},
		{"control_domain", h.controlDomainRef()},
	}
}

func (h *Host) poolRecord() structure {
	return structure{
		{"uuid", h.pool.uuid},
		{"name_label", ""},
		{"master", h.host.ref},
		{"other_config", structure{}},
	}
}

// controlDomainRef is the ref of the control domain in the host's record.
func (h *Host) controlDomainRef() string {
	if h.otherDom0 {
		return newObject().ref
	}
	return h.dom0.ref
}
