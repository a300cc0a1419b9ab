package xapitest

func networkMethods() []*method {
	ms := []*method{
		getAll("network", func(h *Host) array {
			refs := array{}
			for _, n := range h.networkOrder {
				refs = append(refs, n.ref)
			}
			return refs
		}),
		{name: "network.get_all_records", session: true, role: RoleReadOnly, run: func(h *Host, _ *call) (any, error) {
			records := structure{}
			for _, n := range h.networkOrder {
				records = append(records, member{n.ref, networkRecord(n)})
			}
			return records, nil
		}},
		byUUID("network", func(h *Host, uuid string) string {
			for _, n := range h.networks {
				if n.uuid == uuid {
					return n.ref
				}
			}
			return ""
		}),
	}
	return append(ms, recordMethods("network", func(h *Host, ref string) structure {
		if n := h.networks[ref]; n != nil {
			return networkRecord(n)
		}
		return nil
	})...)
}

func networkRecord(n *networkObject) structure {
	return structure{
		{"uuid", n.uuid},
		{"name_label", "Pool-wide network"},
		{"name_description", ""},
		{"allowed_operations", array{}},
		{"current_operations", structure{}},
		{"VIFs", array{}},
		{"PIFs", array{}},
		{"MTU", int64(1500)},
		{"other_config", mapValue(n.otherConfig)},
		{"bridge", "xenbr0"},
		{"managed", true},
		{"blobs", structure{}},
		{"tags", array{}},
		{"default_locking_mode", "unlocked"},
		{"assigned_ips", structure{}},
		{"purpose", stringArray(n.purposes)},
	}
}
