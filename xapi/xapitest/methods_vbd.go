package xapitest

import (
	"fmt"
	"strings"
)

func vbdMethods() []*method {
	act := func(name string, do func(h *Host, ref string) error) *method {
		return &method{name: "VBD." + name, session: true, params: []kind{text}, role: RoleVMAdmin, mutates: true,
			run: func(h *Host, c *call) (any, error) {
				if err := do(h, c.text(0)); err != nil {
					return nil, err
				}
				return "", nil
			}}
	}
	ms := []*method{
		{name: "VBD.create", session: true, params: []kind{strct}, role: RoleVMAdmin, mutates: true,
			check: unmarshalVBD, run: func(h *Host, c *call) (any, error) {
				b, err := h.createVBD(c.wire)
				if err != nil {
					return nil, err
				}
				return b.ref, nil
			}},
		act("plug", (*Host).plug),
		act("unplug", func(h *Host, ref string) error { return h.unplug(ref, "unplug") }),
		act("unplug_force", func(h *Host, ref string) error { return h.unplug(ref, "unplug_force") }),
		act("destroy", (*Host).destroy),
		byUUID("VBD", func(h *Host, uuid string) string {
			if b := h.vbdByUUID(uuid); b != nil {
				return b.ref
			}
			return ""
		}),
		getAll("VBD", func(h *Host) array {
			refs := array{}
			for _, b := range h.vbdOrder {
				refs = append(refs, b.ref)
			}
			return refs
		}),
		{name: "VBD.get_all_records", session: true, role: RoleReadOnly, run: func(h *Host, _ *call) (any, error) {
			return h.vbdRecordsWhere("true")
		}},
		{name: "VBD.get_all_records_where", session: true, params: []kind{text}, role: RoleReadOnly,
			run: func(h *Host, c *call) (any, error) { return h.vbdRecordsWhere(c.text(0)) }},
	}
	return append(ms, recordMethods("VBD", func(h *Host, ref string) structure {
		if b := h.vbds[ref]; b != nil {
			return h.vbdRecord(b)
		}
		return h.guestVBDRecord(ref)
	})...)
}

// unmarshalVBD reads the structure of VBD.create in the order of the data model, which
// determines the error if several members are wrong. It ignores "device" and
// "currently_attached", which matter only for a suspended VM.
func unmarshalVBD(c *call) error {
	s := c.args[0].(structure)
	var err error
	member := func(name string, k kind, otherwise any) any {
		if err != nil {
			return otherwise
		}
		v, ok := s.get(name)
		switch {
		case ok:
			if err = unmarshal(k, v); err != nil {
				return otherwise
			}
			return v
		case otherwise == nil:
			err = fail("INTERNAL_ERROR", fmt.Sprintf("Server_helpers.Dispatcher_FieldNotFound(%q)", name))
		}
		return otherwise
	}
	str := func(name string, otherwise any) string { v, _ := member(name, text, otherwise).(string); return v }
	flag := func(name string, otherwise any) bool { v, _ := member(name, boolean, otherwise).(bool); return v }
	dict := func(name string) map[string]string {
		v, _ := member(name, stringMap, nil).(structure)
		return stringMapOf(v)
	}
	enum := func(name string, values ...string) string {
		v := str(name, nil)
		for _, allowed := range values {
			if strings.EqualFold(v, allowed) {
				return allowed
			}
		}
		if err == nil {
			err = ocamlFailure("Unknown tag/contents")
		}
		return ""
	}
	f := &c.wire
	f.vm = str("VM", nil)
	f.vdi = str("VDI", nil)
	str("device", "")
	f.userdevice = str("userdevice", nil)
	f.bootable = flag("bootable", nil)
	f.mode = enum("mode", "RO", "RW")
	f.typ = enum("type", "CD", "Disk", "Floppy")
	f.unpluggable = flag("unpluggable", true)
	f.empty = flag("empty", nil)
	f.otherConfig = dict("other_config")
	flag("currently_attached", false)
	f.qosType = str("qos_algorithm_type", nil)
	f.qosParams = dict("qos_algorithm_params")
	return err
}

func (h *Host) vbdRecordsWhere(filter string) (any, error) {
	matches, err := parseFilter(filter)
	if err != nil {
		return nil, err
	}
	records := structure{}
	for _, b := range h.vbdOrder {
		ok, err := matches(b.column)
		if err != nil {
			return nil, err
		}
		if ok {
			records = append(records, member{b.ref, h.vbdRecord(b)})
		}
	}
	return records, nil
}

// column is the database text of a field. Nested names have two underscores there.
func (b *vbdObject) column(name string) (string, bool) {
	truth := func(v bool) (string, bool) { return fmt.Sprint(v), true }
	switch name {
	case "ref", "_ref":
		return b.ref, true
	case "uuid":
		return b.uuid, true
	case "VM":
		return b.vm, true
	case "VDI":
		return b.vdi, true
	case "device":
		return b.device, true
	case "userdevice":
		return b.userdevice, true
	case "mode":
		return b.mode, true
	case "type":
		return b.typ, true
	case "qos__algorithm_type":
		return b.qosType, true
	case "bootable":
		return truth(b.bootable)
	case "unpluggable":
		return truth(b.unpluggable)
	case "empty":
		return truth(b.empty)
	case "currently_attached":
		return truth(b.attached)
	}
	return "", false
}

func (h *Host) vbdRecord(b *vbdObject) structure {
	allowed, current := array{"attach", "plug"}, structure{}
	if b.attached {
		allowed = array{"unplug", "unplug_force"}
	}
	if b.operation != "" {
		allowed, current = array{}, structure{{b.task, b.operation}}
	}
	return structure{
		{"uuid", b.uuid},
		{"allowed_operations", allowed},
		{"current_operations", current},
		{"VM", b.vm},
		{"VDI", b.vdi},
		{"device", b.device},
		{"userdevice", b.userdevice},
		{"bootable", b.bootable},
		{"mode", b.mode},
		{"type", b.typ},
		{"unpluggable", b.unpluggable},
		{"storage_lock", false},
		{"empty", b.empty},
		{"other_config", mapValue(b.otherConfig)},
		{"currently_attached", b.attached},
		{"status_code", int64(0)},
		{"status_detail", ""},
		{"runtime_properties", structure{}},
		{"qos_algorithm_type", b.qosType},
		{"qos_algorithm_params", mapValue(b.qosParams)},
		{"qos_supported_algorithms", array{}},
		{"metrics", nullRef},
	}
}
