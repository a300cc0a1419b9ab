package xapitest

import "testing"

func TestCallRefusals(t *testing.T) {
	h := start(t, Config{})
	session := h.NewSession(RoleRoot)
	vdiUUID := addVDI(t, h, VDISpec{})
	vdi := mustString(t, h, "VDI.get_by_uuid", session, vdiUUID)
	without := func(name string) map[string]any {
		s := vbdStruct(t, h, session, vdiUUID)
		delete(s, name)
		return s
	}
	with := func(name string, value any) map[string]any {
		s := vbdStruct(t, h, session, vdiUUID)
		s[name] = value
		return s
	}
	internal := func(text string) []string { return []string{"INTERNAL_ERROR", text} }
	type args = []any
	tests := []struct {
		name, method string
		args         args
		want         []string
	}{
		{"unknown method", "VDI.nothing", args{session}, []string{"MESSAGE_METHOD_UNKNOWN", "VDI.nothing"}},
		{"unknown method without parameters", "x", nil, []string{"MESSAGE_METHOD_UNKNOWN", "x"}},
		{"unknown method, bad session", "x", args{"y"}, []string{"SESSION_INVALID", "y"}},
		{"case matters", "Session.logout", args{session}, []string{"MESSAGE_METHOD_UNKNOWN", "Session.logout"}},
		{"too few", "VDI.get_by_uuid", args{session}, []string{"MESSAGE_PARAMETER_COUNT_MISMATCH", "VDI.get_by_uuid", "1", "0"}},
		{"too many", "VDI.get_by_uuid", args{session, "a", "b"}, []string{"MESSAGE_PARAMETER_COUNT_MISMATCH", "VDI.get_by_uuid", "1", "2"}},
		{"no session", "session.logout", nil, []string{"MESSAGE_PARAMETER_COUNT_MISMATCH", "session.logout", "0", "-1"}},
		{"login too few", loginMethod, args{""}, []string{"MESSAGE_PARAMETER_COUNT_MISMATCH", loginMethod, "2", "1"}},
		{"arity before session", "VDI.get_by_uuid", args{"bad"}, []string{"MESSAGE_PARAMETER_COUNT_MISMATCH", "VDI.get_by_uuid", "1", "0"}},
		{"int for string", "VDI.get_by_uuid", args{session, rawXML("<value><int>3</int></value>")}, internal(`Failure("Expected string, got 'I(3)'")`)},
		{"base64 for string", "VDI.get_by_uuid", args{session, rawXML("<value><base64>YQ==</base64></value>")}, internal(`Failure("Expected string, got 'B64(a)'")`)},
		{"types before session", "VDI.get_by_uuid", args{"bad", true}, internal(`Failure("Expected string, got 'B(true)'")`)},
		{"session invalid", "VDI.get_by_uuid", args{"OpaqueRef:NULL", vdiUUID}, []string{"SESSION_INVALID", "OpaqueRef:NULL"}},
		{"session empty", "session.get_uuid", args{"", ""}, []string{"SESSION_INVALID", ""}},
		{"other session unknown", "session.get_uuid", args{session, "x"}, []string{"HANDLE_INVALID", "session", "x"}},
		{"uuid", "VDI.get_by_uuid", args{session, "x"}, []string{"UUID_INVALID", "VDI", "x"}},
		{"VM uuid", "VM.get_by_uuid", args{session, "x"}, []string{"UUID_INVALID", "VM", "x"}},
		{"handle", "VDI.get_record", args{session, "x"}, []string{"HANDLE_INVALID", "VDI", "x"}},
		{"handle of VBD", "VBD.plug", args{session, "x"}, []string{"HANDLE_INVALID", "VBD", "x"}},
		{"filter", "VBD.get_all_records_where", args{session, `field "VM"=`}, []string{"INVALID_VALUE", `field "VM"=`, "Stdlib.Parsing.Parse_error"}},
		{"no struct", "VBD.create", args{session, "x"}, internal(`Failure("bad __structure")`)},
		{"no VM", "VBD.create", args{session, without("VM")}, internal(`Server_helpers.Dispatcher_FieldNotFound("VM")`)},
		{"no empty", "VBD.create", args{session, without("empty")}, internal(`Server_helpers.Dispatcher_FieldNotFound("empty")`)},
		{"no qos params", "VBD.create", args{session, without("qos_algorithm_params")}, internal(`Server_helpers.Dispatcher_FieldNotFound("qos_algorithm_params")`)},
		{"member before session", "VBD.create", args{"bad", without("mode")}, internal(`Server_helpers.Dispatcher_FieldNotFound("mode")`)},
		{"bool as text", "VBD.create", args{session, with("bootable", "true")}, internal(`Failure("Expected bool, got 'S(true)'")`)},
		{"optional bool as int", "VBD.create", args{session, with("unpluggable", rawXML("<value><int>1</int></value>"))}, internal(`Failure("Expected bool, got 'I(1)'")`)},
		{"map as text", "VBD.create", args{session, with("other_config", "")}, internal(`Failure("Expected dictionary, got 'S()'")`)},
		{"unknown enum", "VBD.create", args{session, with("mode", "R")}, internal(`Failure("Unknown tag/contents")`)},
		{"create: VM", "VBD.create", args{session, with("VM", "x")}, []string{"HANDLE_INVALID", "VM", "x"}},
		{"create: VDI", "VBD.create", args{session, with("VDI", "x")}, []string{"HANDLE_INVALID", "VDI", "x"}},
		{"create: CD read-write", "VBD.create", args{session, func() any { s := with("mode", "RW"); s["type"] = "CD"; return s }()}, []string{"VBD_CDS_MUST_BE_READONLY"}},
		{"create: empty disk", "VBD.create", args{session, with("empty", true)}, []string{"VBD_NOT_REMOVABLE_MEDIA", "in constructor"}},
		{"create: device", "VBD.create", args{session, with("userdevice", "256")}, []string{"INVALID_DEVICE", "256"}},
		{"no nbd info", "VDI.get_nbd_info", args{session, "x"}, []string{"HANDLE_INVALID", "VDI", "x"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { mustFail(t, h, tt.want, tt.method, tt.args...) })
	}
	if got := len(h.VBDs()); got != 0 {
		t.Errorf("got %d VBDs from refused calls, want 0", got)
	}
	if got := must(t, h, "VDI_get_virtual_size", session, vdi); got != "1048576" {
		t.Errorf("old spelling of a name: got %v, want 1048576", got)
	}
}
