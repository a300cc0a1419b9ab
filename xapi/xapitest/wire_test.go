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
