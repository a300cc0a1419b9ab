package xapi_test

import (
	"bytes"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"xapi-nbd/xapi"
	"xapi-nbd/xapi/xapitest"
)

// forgedSuperuser is a key that ends its map and goes on with a field that would give
// its session every permission.
const forgedSuperuser = `x</name><value>v</value></member></struct></value></member>` +
	`<member><name>is_local_superuser</name><value><boolean>1</boolean></value></member>` +
	`<member><name>y</name><value><struct><member><name>z`

func TestSessionRecordWithOddKeys(t *testing.T) {
	keys := append(slices.Clone(oddKeys), struct {
		name, key string
		byFields  bool
	}{"a field that gives permissions", forgedSuperuser, true})
	for _, tt := range keys {
		t.Run(tt.name, func(t *testing.T) {
			h, c := host(t)
			for _, role := range []xapitest.Role{xapitest.RoleVMAdmin, xapitest.RoleReadOnly, xapitest.RoleRoot} {
				ref := h.NewSession(role)
				s := c.Bind(xapi.SessionRef(ref))
				want, err := s.Record(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				h.SetSessionOtherConfig(ref, map[string]string{tt.key: "x"})
				h.ResetCalls()
				got, err := s.Record(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("record (-want +got):\n%s", diff)
				}
				if byFields := len(h.Calls()) > 1; byFields != tt.byFields {
					t.Errorf("got %d calls, want more than one: %v", len(h.Calls()), tt.byFields)
				}
			}
		})
	}
}

// The log line about a session's record does not contain the session ref.
func TestUnreadableSessionRecordIsNotShown(t *testing.T) {
	h, _ := host(t)
	var log bytes.Buffer
	c := xapi.New(xapi.Config{Socket: h.Socket(), Logger: slog.New(slog.NewTextHandler(&log, nil))})
	t.Cleanup(c.Close)
	ref := h.NewSession(xapitest.RoleVMAdmin)
	h.SetSessionOtherConfig(ref, map[string]string{endOfMap: "x"})
	if _, err := c.Bind(xapi.SessionRef(ref)).Record(t.Context()); err != nil {
		t.Fatal(err)
	}
	if text := log.String(); !strings.Contains(text, "cannot be read") || strings.Contains(text, strings.TrimPrefix(ref, "OpaqueRef:")) {
		t.Errorf("got log %q, want a line without the ref", text)
	}
}
