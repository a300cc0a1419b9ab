package xapitest

import (
	"bufio"
	"bytes"
	"encoding/xml"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"xapi-nbd/test/leaks"
)

// patience is for how long a test waits before it calls the host stuck.
const patience = 30 * time.Second

func TestMain(m *testing.M) { leaks.Main(m) }

// start makes a host in a short directory: a socket's path has little room.
func start(t *testing.T, cfg Config) *Host {
	t.Helper()
	if cfg.Dir == "" {
		dir, err := os.MkdirTemp("", "xapi")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.RemoveAll(dir) })
		cfg.Dir = dir
	}
	h, err := Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Errorf("closing the host: %v", err)
		}
	})
	return h
}

func addVDI(t *testing.T, h *Host, spec VDISpec) (uuid string) {
	t.Helper()
	if spec.Size == 0 && spec.Image == "" {
		spec.Size = 1 << 20
	}
	uuid, err := h.AddVDI(spec)
	if err != nil {
		t.Fatal(err)
	}
	return uuid
}

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

func parseReply(t *testing.T, body []byte) (value any, failed []string) {
	t.Helper()
	p := &parser{dec: xml.NewDecoder(bytes.NewReader(body))}
	var v any
	err := p.element("methodResponse", func() error {
		return p.element("params", func() error {
			return p.element("param", func() (err error) { v, err = p.value(); return err })
		})
	})
	if err != nil {
		t.Fatalf("reply %s: %v", body, err)
	}
	s := v.(structure)
	if status, _ := s.get("Status"); status == "Success" {
		value, _ = s.get("Value")
		return value, nil
	}
	d, _ := s.get("ErrorDescription")
	for _, e := range d.(array) {
		failed = append(failed, e.(string))
	}
	return nil, failed
}

// must makes a call that has to succeed.
func must(t *testing.T, h *Host, method string, args ...any) any {
	t.Helper()
	value, failed, err := try(t, h, method, args...)
	if err != nil || failed != nil {
		t.Fatalf("%s: got failure %q, error %v, want success", method, failed, err)
	}
	return value
}

func mustString(t *testing.T, h *Host, method string, args ...any) string {
	t.Helper()
	return must(t, h, method, args...).(string)
}

// mustFail makes a call that has to fail with exactly these elements.
func mustFail(t *testing.T, h *Host, want []string, method string, args ...any) {
	t.Helper()
	value, failed, err := try(t, h, method, args...)
	if err != nil || !slices.Equal(failed, want) {
		t.Errorf("%s: got value %v, failure %q, error %v, want failure %q", method, value, failed, err, want)
	}
}

// mustDrop makes a call whose connection has to break.
func mustDrop(t *testing.T, h *Host, method string, args ...any) {
	t.Helper()
	if value, failed, err := try(t, h, method, args...); err == nil {
		t.Errorf("%s: got value %v, failure %q, want a dropped connection", method, value, failed)
	}
}

func vbdStruct(t *testing.T, h *Host, session, vdiUUID string) map[string]any {
	t.Helper()
	return map[string]any{
		"VM":         mustString(t, h, "VM.get_by_uuid", session, h.ControlDomainUUID()),
		"VDI":        mustString(t, h, "VDI.get_by_uuid", session, vdiUUID),
		"userdevice": "autodetect", "bootable": false, "mode": "RO", "type": "Disk", "empty": false,
		"other_config": map[string]any{"owner": "test"}, "qos_algorithm_type": "", "qos_algorithm_params": map[string]any{},
	}
}

func createVBD(t *testing.T, h *Host, session, vdiUUID string) (ref string) {
	t.Helper()
	return mustString(t, h, "VBD.create", session, vbdStruct(t, h, session, vdiUUID))
}
