package xapitest

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"
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
