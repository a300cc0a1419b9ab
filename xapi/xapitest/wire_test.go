package xapitest

import (
	"fmt"
	"strings"
	"testing"
)

const replyHeaders = "cache-control: no-cache, no-store\r\ncontent-type: text/xml\r\n" +
	"Access-Control-Allow-Origin: *\r\nAccess-Control-Allow-Headers: X-Requested-With\r\n\r\n"

func TestReplyBytes(t *testing.T) {
	h := start(t, Config{})
	session := h.NewSession(RoleReadOnly)
	uuid := addVDI(t, h, VDISpec{})
	h.Fail("VDI.get_by_uuid", "A<B", "x&\"'>\x01\x7f\té")

	success := `<?xml version="1.0"?><methodResponse><params><param><value><struct><member><name>Status</name><value>Success</value></member><member><name>Value</name><value>` +
		h.dom0.ref + `</value></member></struct></value></param></params></methodResponse>`
	failure := `<?xml version="1.0"?><methodResponse><params><param><value><struct><member><name>Status</name><value>Failure</value></member><member><name>ErrorDescription</name><value><array><data><value>A&lt;B</value><value>x&amp;&quot;'&gt;` + "\x7f\té" +
		`</value></data></array></value></member></struct></value></param></params></methodResponse>`

	first := callBody("VM.get_by_uuid", session, h.ControlDomainUUID())
	second := callBody("VDI.get_by_uuid", session, uuid)
	raw := fmt.Sprintf("POST /RPC2 HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s", len(first), first) +
		fmt.Sprintf("POST / HTTP/1.0\r\nCONTENT-LENGTH:%d\r\n\r\n%s", len(second), second)
	want := fmt.Sprintf("HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: keep-alive\r\n", len(success)) + replyHeaders + success +
		fmt.Sprintf("HTTP/1.0 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n", len(failure)) + replyHeaders + failure
	if got := exchange(t, h, raw); got != want {
		t.Errorf("got\n%q\nwant\n%q", got, want)
	}
}

func TestBootingBytes(t *testing.T) {
	h := start(t, Config{})
	h.Booting(true)
	got := exchange(t, h, "POST / HTTP/1.1\r\nConnection: close\r\nContent-Length: 95\r\n\r\n"+
		"<methodCall><methodName>session.login_with_password</methodName><params></params></methodCall>\n")
	head, body, _ := strings.Cut(got, "\r\n\r\n")
	wantHead := fmt.Sprintf("HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\ncache-control: no-cache, no-store\r\ncontent-type: text/xml", len(body))
	if head != wantHead || !strings.Contains(body, "<array><data><value>HOST_STILL_BOOTING</value></data></array>") {
		t.Errorf("got %q", got)
	}
}

func TestValues(t *testing.T) {
	tests := []struct {
		value any
		want  string
	}{
		{"", "<value></value>"},
		{"  ", "<value>  </value>"},
		{int64(-1073741824), "<value>-1073741824</value>"},
		{true, "<value><boolean>1</boolean></value>"},
		{false, "<value><boolean>0</boolean></value>"},
		{0.5, "<value><double>0.5</double></value>"},
		{0.1, "<value><double>0.1</double></value>"},
		{100.0, "<value><double>100</double></value>"},
		{1e20, "<value><double>1e+20</double></value>"},
		{1e-7, "<value><double>1e-07</double></value>"},
		{1.0 / 3, "<value><double>0.3333333333333333</double></value>"},
		{dateTime("19700101T00:00:00Z"), "<value><dateTime.iso8601>19700101T00:00:00Z</dateTime.iso8601></value>"},
		{array{}, "<value><array><data></data></array></value>"},
		{structure{}, "<value><struct></struct></value>"},
		{structure{{"a&b", "c&d"}}, "<value><struct><member><name>a&b</name><value>c&amp;d</value></member></struct></value>"},
		{null{}, "<value><nil/></value>"},
	}
	for _, tt := range tests {
		if got := string(appendValue(nil, tt.value)); got != tt.want {
			t.Errorf("%#v: got %s, want %s", tt.value, got, tt.want)
		}
	}
}

func TestHTTPRefusals(t *testing.T) {
	body := callBody("session.login_with_password", "", "")
	length := fmt.Sprintf("Content-Length: %d\r\n", len(body))
	tests := []struct {
		name, raw, want string // want is the status line's end; "" means closed without an answer
	}{
		{"no content-length", "POST / HTTP/1.1\r\n\r\n" + body, "500 Internal Error"},
		{"chunked", fmt.Sprintf("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", len(body), body), "500 Internal Error"},
		{"content-length not a number", "POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n" + body, "500 Internal Error"},
		{"negative content-length", "POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n" + body, "500 Internal Error"},
		{"negative content-length 2", "POST / HTTP/1.1\r\nContent-Length: -2\r\n\r\n" + body, "500 Internal Error"},
		{"long headers", "POST / HTTP/1.1\r\n" + length + "X: " + strings.Repeat("x", 1024) + "\r\n\r\n" + body, "500 Internal Error"},
		{"long body", "POST / HTTP/1.1\r\nContent-Length: 307201\r\n\r\n", "500 Internal Error"},
		{"two fields", "POST /\r\n" + length + "\r\n" + body, "500 Internal Error"},
		{"four fields", "POST / x HTTP/1.1\r\n" + length + "\r\n" + body, "500 Internal Error"},
		{"not HTTP", "POST / XTTP/1.1\r\n" + length + "\r\n" + body, "500 Internal Error"},
		{"unknown method", "PATCH / HTTP/1.1\r\n" + length + "\r\n" + body, "501 Method not implemented"},
		{"no handler for GET", "GET / HTTP/1.1\r\n\r\n", "403 Forbidden"},
		{"JSON-RPC", "POST /jsonrpc HTTP/1.1\r\n" + length + "\r\n" + body, "403 Forbidden"},
		{"empty body", post(""), "500 Internal Error"},
		{"not XML", post("{}"), "500 Internal Error"},
		{"unclosed", post("<methodCall><methodName>x</methodName><params>"), "500 Internal Error"},
		{"no params", post("<methodCall><methodName>x</methodName></methodCall>"), "500 Internal Error"},
		{"not a call", post("<methodResponse><params></params></methodResponse>"), "500 Internal Error"},
		{"unknown type", post(callBody("x", rawXML("<value><text>a</text></value>"))), "500 Internal Error"},
		{"empty int", post(callBody("x", rawXML("<value><int/></value>"))), "500 Internal Error"},
		{"bad int", post(callBody("x", rawXML("<value><int>1x</int></value>"))), "500 Internal Error"},
		{"bad base64", post(callBody("x", rawXML("<value><base64>?</base64></value>"))), "500 Internal Error"},
		{"broken UTF-8", post(callBody("x", rawXML("<value>\xff</value>"))), "500 Internal Error"},
		{"control character", post(callBody("x", rawXML("<value>\x01</value>"))), "500 Internal Error"},
		{"unknown entity", post(callBody("x", rawXML("<value>&nbsp;</value>"))), "500 Internal Error"},
	}
	h := start(t, Config{})
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := exchange(t, h, tt.raw)
			status, rest, _ := strings.Cut(got, "\r\n")
			if status != "HTTP/1.1 "+tt.want {
				t.Fatalf("got %q, want status %q", got, tt.want)
			}
			for _, part := range []string{"content-type: text/html\r\n", "connection: close\r\n", "<html><body><h1>HTTP " + tt.want[:3]} {
				if !strings.Contains(rest, part) {
					t.Errorf("got %q, want it to contain %q", rest, part)
				}
			}
		})
	}
	if got := exchange(t, h, "POST / HTTP/1.0\r\nContent-Length: 1\r\n\r\nx"); !strings.HasPrefix(got, "HTTP/1.0 500 ") {
		t.Errorf("got %q, want an answer in version 1.0", got)
	}
	if n := h.Sessions(); n != 0 {
		t.Errorf("got %d sessions from refused requests, want 0", n)
	}
}

func TestLimitsAreExact(t *testing.T) {
	h := start(t, Config{})
	body := callBody("session.login_with_password", "", "")
	body += strings.Repeat(" ", maxBody-len(body))
	head := fmt.Sprintf("POST / HTTP/1.0\r\nContent-Length: %d\r\nX: ", maxBody)
	for _, tt := range []struct {
		total int
		want  string
	}{{maxHeader, "HTTP/1.0 200 OK"}, {maxHeader + 1, "HTTP/1.1 500 Internal Error"}} {
		raw := head + strings.Repeat("x", tt.total-len(head)-4) + "\r\n\r\n" + body
		if got, _, _ := strings.Cut(exchange(t, h, raw), "\r\n"); got != tt.want {
			t.Errorf("header block of %d bytes: got %q, want %q", tt.total, got, tt.want)
		}
	}
}

func TestAcceptedForms(t *testing.T) {
	h := start(t, Config{})
	// White space between elements, empty strings in all spellings, a processing
	// instruction, a comment, and a parameter too many, which login ignores.
	body := " <?x y?>\n<methodCall>\n <methodName>session.login_with_password</methodName>\n <params>\n" +
		"  <param>\n <value/> </param> <param><value><string/></value></param>\n" +
		"<param><value>1<!-- . -->.0</value></param><param><value> <string>a &amp; b</string> </value></param>" +
		"<param><value><base64>AAAA</base64></value></param>\n </params>\n</methodCall>\n"
	got := exchange(t, h, "POST /x HTTP/1.1\nno colon\nconnection: Close\ncontent-length: "+fmt.Sprint(len(body))+"\n\n"+body)
	if !strings.Contains(got, "<value>Success</value>") {
		t.Fatalf("got %q", got)
	}
	_, ref, _ := strings.Cut(got, "<name>Value</name><value>")
	ref, _, _ = strings.Cut(ref, "<")
	if got := must(t, h, "session.get_originator", ref, ref); got != "a & b" {
		t.Errorf("originator: got %q, want %q", got, "a & b")
	}
}

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
