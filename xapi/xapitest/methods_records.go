package xapitest

// recordMethods makes get_record and, for every member of the record, get_<member>.
// record returns nil for an unknown ref. All are allowed to every role.
func recordMethods(class string, record func(h *Host, ref string) structure) []*method {
	get := func(name string, pick func(structure) any) *method {
		return &method{name: class + "." + name, session: true, params: []kind{text}, role: RoleReadOnly,
			run: func(h *Host, c *call) (any, error) {
				r := record(h, c.text(0))
				if r == nil {
					return nil, handleInvalid(class, c.text(0))
				}
				return pick(r), nil
			}}
	}
	ms := []*method{get("get_record", func(r structure) any { return r })}
	for _, m := range memberNames[class] {
		ms = append(ms, get("get_"+m, func(r structure) any { v, _ := r.get(m); return v }))
	}
	return ms
}

// memberNames are the members of each class that have a getter of their own.
var memberNames = map[string][]string{
	"session": {"uuid", "this_host", "this_user", "last_active", "pool", "other_config", "is_local_superuser",
		"subject", "validation_time", "auth_user_sid", "auth_user_name", "rbac_permissions", "tasks", "parent",
		"originator", "client_certificate"},
	"VM": {"uuid", "name_label", "power_state", "resident_on", "VBDs", "domid", "is_control_domain",
		"blocked_operations", "metrics"},
	"VM_metrics": {"uuid", "start_time"},
	"VDI": {"uuid", "name_label", "name_description", "allowed_operations", "current_operations", "SR", "VBDs",
		"virtual_size", "physical_utilisation", "type", "sharable", "read_only", "other_config", "location",
		"managed", "missing", "sm_config", "is_a_snapshot", "snapshot_of", "snapshots", "cbt_enabled", "tags"},
	"SR": {"uuid", "name_label", "name_description", "VDIs", "type", "content_type", "shared", "other_config", "sm_config"},
	"VBD": {"uuid", "allowed_operations", "current_operations", "VM", "VDI", "device", "userdevice", "bootable",
		"mode", "type", "unpluggable", "empty", "other_config", "currently_attached"},
	"network": {"uuid", "name_label", "name_description", "PIFs", "MTU", "other_config", "bridge", "purpose"},
	"host":    {"uuid", "name_label", "hostname", "control_domain"},
	"pool":    {"uuid", "name_label", "master"},
}

// byUUID makes get_by_uuid. find returns "" for an unknown or malformed uuid.
func byUUID(class string, find func(h *Host, uuid string) (ref string)) *method {
	return &method{name: class + ".get_by_uuid", session: true, params: []kind{text}, role: RoleReadOnly,
		run: func(h *Host, c *call) (any, error) {
			if ref := find(h, c.text(0)); ref != "" {
				return ref, nil
			}
			return nil, fail("UUID_INVALID", class, c.text(0))
		}}
}

// single makes find and record functions for a class with one object.
func single(of func(h *Host) object) (find func(*Host, string) string, is func(*Host, string) bool) {
	find = func(h *Host, uuid string) string {
		if o := of(h); o.uuid == uuid {
			return o.ref
		}
		return ""
	}
	return find, func(h *Host, ref string) bool { return of(h).ref == ref }
}

func getAll(class string, list func(h *Host) array) *method {
	return &method{name: class + ".get_all", session: true, role: RoleReadOnly,
		run: func(h *Host, _ *call) (any, error) { return list(h), nil }}
}
