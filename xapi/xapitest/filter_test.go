package xapitest

import "testing"

func TestFilter(t *testing.T) {
	h := start(t, Config{})
	s := h.NewSession(RoleReadOnly)
	if _, err := h.AddForeignVBD(addVDI(t, h, VDISpec{}), nil); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		expr string
		want int
	}{
		{`true`, 1},
		{` false`, 0},
		{`field "VM"="` + h.dom0.ref + `"`, 1},
		{`"` + h.dom0.ref + `" = field "VM"`, 1},
		{`field "VM"="OpaqueRef:NULL"`, 0},
		{`field "currently_attached"="false"and field"mode"="RO" and field "type"="Disk"`, 1},
		{`field "qos__algorithm_type"=""`, 1},
		{`not field "mode"="RW"`, 1},
		{`false or true`, 1},
		{`true or false and false`, 0},   // equal precedence, to the left
		{`true or (false and false)`, 1}, //
		{`not false and false`, 1},       // not (false and false)
		{`(not false) and false`, 0},
		{`"a"="a"`, 1},
		{`field "mode"=field "type"`, 0},
	}
	for _, tt := range tests {
		if got := len(must(t, h, "VBD.get_all_records_where", s, tt.expr).(structure)); got != tt.want {
			t.Errorf("%s: got %d records, want %d", tt.expr, got, tt.want)
		}
	}
	for _, expr := range []string{``, `tru`, `field`, `field "VM"`, `field VM="x"`, `"a"="b`, `(true`, `true)`, `true true`, `true and`, `not`, `"a"=true`, `'a'='b'`} {
		value, failed, err := try(t, h, "VBD.get_all_records_where", s, expr)
		if err != nil || len(failed) != 3 || failed[0] != "INVALID_VALUE" || failed[1] != expr {
			t.Errorf("%s: got %v, %q, %v, want INVALID_VALUE", expr, value, failed, err)
		}
	}
	mustFail(t, h, []string{"INTERNAL_ERROR", "missing column", "x", ""}, "VBD.get_all_records_where", s, `field "x"="y"`)
}
