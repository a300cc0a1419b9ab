package xapitest

import (
	"bufio"
	"bytes"
	"encoding/xml"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

func dial(t *testing.T, h *Host) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", h.Socket())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(patience))
	return conn
}

// callBody writes a methodCall. Arguments are strings, bools, or ready XML of type rawXML.
func callBody(method string, args ...any) string {
	var b strings.Builder
	fmt.Fprintf(&b, "<?xml version=\"1.0\"?><methodCall><methodName>%s</methodName><params>", method)
	for _, a := range args {
		b.WriteString("<param>" + valueXML(a) + "</param>")
	}
	return b.String() + "</params></methodCall>"
}

type rawXML string

func valueXML(a any) string {
	switch a := a.(type) {
	case rawXML:
		return string(a)
	case bool:
		return map[bool]string{true: "<value><boolean>1</boolean></value>", false: "<value><boolean>0</boolean></value>"}[a]
	case map[string]any:
		s := "<value><struct>"
		for k, v := range a {
			s += "<member><name>" + k + "</name>" + valueXML(v) + "</member>"
		}
		return s + "</struct></value>"
	}
	var b bytes.Buffer
	_ = xml.EscapeText(&b, []byte(a.(string)))
	return "<value><string>" + b.String() + "</string></value>"
}

func post(body string) string {
	return fmt.Sprintf("POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
}

// exchange sends raw bytes and returns all that comes back until the host closes.
func exchange(t *testing.T, h *Host, raw string) string {
	t.Helper()
	conn := dial(t, h)
	_, _ = io.WriteString(conn, raw) // the host may have closed already
	b, _ := io.ReadAll(conn)
	return string(b)
}

// try makes one call; err is set if no reply came.
func try(t *testing.T, h *Host, method string, args ...any) (value any, failed []string, err error) {
	t.Helper()
	conn, err := net.Dial("unix", h.Socket())
	if err != nil {
		return nil, nil, err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(conn, post(callBody(method, args...))); err != nil {
		return nil, nil, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, nil, fmt.Errorf("HTTP %s", resp.Status)
	}
	value, failed = parseReply(t, body)
	return value, failed, nil
}
