package xapitest

import (
	"fmt"
	"strings"
	"testing"
)

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
