package xapitest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"
)

func wantError(t *testing.T, what string, got error, want string) {
	t.Helper()
	if got == nil || !strings.Contains(got.Error(), want) {
		t.Errorf("%s: got %v, want %q", what, got, want)
	}
}

func TestOtherClient(t *testing.T) {
	h := start(t, Config{})
	vbd := plugOf(t, h, addVDI(t, h, VDISpec{}))
	h.ResetCalls()
	h.FailAlways("VBD.unplug", "OTHER")
	h.OnCall(func(c CallPoint) Verdict { t.Errorf("got %+v", c); return Drop })
	ctx := t.Context()

	f := openDevice(t, h, vbd)
	wantError(t, "unplug while open", h.UnplugVBD(ctx, vbd.UUID), "SR_BACKEND_FAILURE_46")
	_ = f.Close()
	wantError(t, "destroy while attached", h.DestroyVBD(ctx, vbd.UUID), "OPERATION_NOT_ALLOWED")
	if err := h.UnplugVBD(ctx, vbd.UUID); err != nil || h.VBDs()[0].CurrentlyAttached {
		t.Errorf("unplug: got %v, attached %t", err, h.VBDs()[0].CurrentlyAttached)
	}
	wantError(t, "unplug twice", h.UnplugVBD(ctx, vbd.UUID), "DEVICE_ALREADY_DETACHED")
	if err := h.DestroyVBD(ctx, vbd.UUID); err != nil || len(h.VBDs()) != 0 {
		t.Errorf("destroy: got %v, %d VBDs left", err, len(h.VBDs()))
	}
	wantError(t, "destroy twice", h.DestroyVBD(ctx, vbd.UUID), "UUID_INVALID")
	wantError(t, "unplug of nothing", h.UnplugVBD(ctx, vbd.UUID), "UUID_INVALID")
	wantError(t, "data_destroy of nothing", h.DataDestroy(ctx, "x"), "UUID_INVALID")
	if got := h.Calls(); len(got) != 0 {
		t.Errorf("got calls %v, want none", got)
	}
	_ = h.Close()
	if err := h.UnplugVBD(ctx, vbd.UUID); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: got %v", err)
	}
}

// TestOtherClientLeaves: the call of a client continues when its context ends.
func TestOtherClientLeaves(t *testing.T) {
	h := start(t, Config{Style: StyleNBD})
	vbd := plugOf(t, h, addVDI(t, h, VDISpec{}))
	f := openDevice(t, h, vbd)
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	done := make(chan error, 1)
	go func() { done <- h.UnplugVBD(ctx, vbd.UUID) }()
	waitDisconnected(t, h, vbd)
	cancel(cause)
	if err := <-done; !errors.Is(err, cause) {
		t.Errorf("got %v, want the cause", err)
	}
	_ = f.Close()
	waitFor(t, h, func(vbds []VBD) bool { return !vbds[0].CurrentlyAttached })
	if err := h.DestroyVBD(ctx, vbd.UUID); !errors.Is(err, cause) {
		t.Errorf("after the context's end: got %v, want the cause", err)
	}
	_ = h.Close() // waits for the call if there is one
	if got := len(h.VBDs()); got != 1 {
		t.Errorf("after the context's end: got %d VBDs, want nothing done", got)
	}
}

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

func TestResizeVDI(t *testing.T) {
	for name, cfg := range map[string]Config{"file": {}, "loop": {Loop: true}, "shared loop": {Loop: true, Style: StyleSM}} {
		t.Run(name, func(t *testing.T) {
			if cfg.Loop {
				requireLoop(t)
			}
			h := start(t, cfg)
			uuid := addVDI(t, h, VDISpec{})
			s := h.NewSession(RoleRoot)
			vdi := mustString(t, h, "VDI.get_by_uuid", s, uuid)
			files := []*os.File{openDevice(t, h, plugOf(t, h, uuid)), openDevice(t, h, plugOf(t, h, uuid))}
			for _, size := range []int64{2 << 20, 512} {
				if err := h.ResizeVDI(uuid, size); err != nil {
					t.Fatal(err)
				}
				if got := must(t, h, "VDI.get_virtual_size", s, vdi); got != fmt.Sprint(size) {
					t.Errorf("virtual_size: got %v, want %d", got, size)
				}
				for _, f := range files {
					if got, err := f.Seek(0, io.SeekEnd); err != nil || got != size {
						t.Errorf("device: got %d, %v, want %d", got, err, size)
					}
				}
			}
			for _, f := range files {
				_ = f.Close()
			}
		})
	}
}

func TestResizeVDIRefusals(t *testing.T) {
	h := start(t, Config{})
	uuid := addVDI(t, h, VDISpec{})
	wantError(t, "unknown", h.ResizeVDI("x", 512), "no such VDI")
	wantError(t, "negative", h.ResizeVDI(uuid, -1), "invalid argument")
	if err := h.ResizeVDI(uuid, 1000); err != nil {
		t.Errorf("without a loop device: got %v", err)
	}

	requireLoop(t)
	h = start(t, Config{Loop: true})
	uuid = addVDI(t, h, VDISpec{SectorSize: 4096})
	plugOf(t, h, uuid)
	wantError(t, "tail", h.ResizeVDI(uuid, 4096+512), "drop the last 512 bytes")
	if fi, err := os.Stat(h.ImagePath(uuid)); err != nil || fi.Size() != 1<<20 {
		t.Errorf("the image after a refusal: got %v, %v", fi, err)
	}
}
