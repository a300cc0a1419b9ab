package xapitest

import (
	"bytes"
	"encoding/xml"
	"slices"
	"testing"
)

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
