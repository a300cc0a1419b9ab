package xapitest

import (
	"context"
	"strings"
	"testing"
	"time"
)

// vdiState is the type of a VDI and its operations as its record shows them.
func vdiState(t *testing.T, h *Host, uuid string) (typ string, operations []string) {
	t.Helper()
	s := h.NewSession(RoleReadOnly)
	record := must(t, h, "VDI.get_record", s, mustString(t, h, "VDI.get_by_uuid", s, uuid)).(structure)
	current, _ := record.get("current_operations")
	for _, m := range current.(structure) {
		if !strings.HasPrefix(m.name, "OpaqueRef:") {
			t.Errorf("task: got %q, want a ref", m.name)
		}
		operations = append(operations, m.value.(string))
	}
	v, _ := record.get("type")
	return v.(string), operations
}

func TestDataDestroyShows(t *testing.T) {
	h := start(t, Config{})
	h.cfg.DataDestroyWait = time.Minute
	uuid := addVDI(t, h, VDISpec{})
	vbd := plugOf(t, h, uuid)
	done := make(chan error, 1)
	go func() { done <- h.DataDestroy(t.Context(), uuid) }()
	waitFor(t, h, func([]VBD) bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		return h.vdiByUUID(uuid).operation != ""
	})
	if typ, operations := vdiState(t, h, uuid); typ != "cbt_metadata" || len(operations) != 1 || operations[0] != "data_destroy" {
		t.Errorf("while it waits: got type %s, operations %q", typ, operations)
	}
	for _, do := range []func(context.Context, string) error{h.UnplugVBD, h.DestroyVBD} {
		if len(done) != 0 {
			t.Error("it did not wait")
		}
		if err := do(t.Context(), vbd.UUID); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if typ, operations := vdiState(t, h, uuid); typ != "cbt_metadata" || len(operations) != 0 {
		t.Errorf("afterwards: got type %s, operations %q", typ, operations)
	}
}

// TestDataDestroyTwice: the second one must not take the first one's mark for success.
func TestDataDestroyTwice(t *testing.T) {
	h := start(t, Config{})
	h.cfg.DataDestroyWait = 20 * time.Millisecond
	uuid := addVDI(t, h, VDISpec{})
	plugOf(t, h, uuid)
	done := make(chan error, 2)
	for range 2 {
		go func() { done <- h.DataDestroy(t.Context(), uuid) }()
	}
	for range 2 {
		wantError(t, "with a VBD", <-done, "VDI_IN_USE")
	}
	if typ, operations := vdiState(t, h, uuid); typ != "user" || len(operations) != 0 {
		t.Errorf("afterwards: got type %s, operations %q", typ, operations)
	}
}
