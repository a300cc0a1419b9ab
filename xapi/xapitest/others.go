package xapitest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
)

// UnplugVBD acts like VBD.unplug of another client. Calls does not list it, OnCall is not
// called, and of the faults only BlockWork applies. When ctx ends first the error is its
// cause, and the unplug continues as after a broken connection.
func (h *Host) UnplugVBD(ctx context.Context, uuid string) error {
	return h.onVBD(ctx, uuid, func(ref string) error { return h.unplug(ref, "unplug") })
}

// DestroyVBD acts like VBD.destroy of another client, see UnplugVBD.
func (h *Host) DestroyVBD(ctx context.Context, uuid string) error {
	return h.onVBD(ctx, uuid, h.destroy)
}

// DataDestroy acts like VDI.data_destroy of another client, see UnplugVBD. It waits up to 4 s
// until the VDI's VBDs are destroyed.
func (h *Host) DataDestroy(ctx context.Context, vdiUUID string) error {
	return h.another(ctx, func() error {
		v := h.vdiByUUID(vdiUUID)
		if v == nil {
			return fail("UUID_INVALID", "VDI", vdiUUID)
		}
		return h.dataDestroy(v.ref)
	})
}

func (h *Host) onVBD(ctx context.Context, uuid string, run func(ref string) error) error {
	return h.another(ctx, func() error {
		b := h.vbdByUUID(uuid)
		if b == nil {
			return fail("UUID_INVALID", "VBD", uuid)
		}
		return run(b.ref)
	})
}

// another executes f, the work of a call, with h.mu held. As on a connection, the caller may
// stop waiting, and Close waits for the call.
func (h *Host) another(ctx context.Context, run func() error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	done := make(chan error, 1)
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		return net.ErrClosed
	}
	h.wg.Go(func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		done <- describe(run())
	})
	h.mu.Unlock()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// ResizeVDI gives the VDI's image file another size in bytes, by cutting it or
// by adding zeros, also below attached devices, which xapi would refuse. It waits
// for operations on the VDI to end.
func (h *Host) ResizeVDI(uuid string, size int64) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.resize(uuid, size); err != nil {
		return fmt.Errorf("xapitest: resizing VDI %s to %d bytes: %w", uuid, size, err)
	}
	return nil
}

// SetVirtualSize gives the VDI's record another virtual_size, in bytes, and leaves
// image and devices as they are. An unknown uuid is ignored.
func (h *Host) SetVirtualSize(uuid string, size int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if v := h.vdiByUUID(uuid); v != nil {
		v.size = size
	}
}

// ResizeDevice is ResizeVDI, but the record keeps its virtual_size.
func (h *Host) ResizeDevice(uuid string, size int64) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	var before int64
	if v := h.vdiByUUID(uuid); v != nil {
		before = v.size
		defer func() { v.size = before }()
	}
	if err := h.resize(uuid, size); err != nil {
		return fmt.Errorf("xapitest: resizing the device of VDI %s to %d bytes: %w", uuid, size, err)
	}
	return nil
}

// resize is ResizeVDI with h.mu held; it is unlocked while it waits.
func (h *Host) resize(uuid string, size int64) error {
	v := h.vdiByUUID(uuid)
	if v == nil {
		return errors.New("no such VDI")
	}
	for v.busy { // its devices may be coming or going
		if !h.waitChange(h.ctx) {
			return net.ErrClosed
		}
	}
	loops := h.loopsOf(v)
	if tail := size % int64(v.SectorSize); len(loops) > 0 && tail != 0 {
		return fmt.Errorf("a loop device would drop the last %d bytes", tail)
	}
	if v.image != nil {
		if err := v.growImage(size); err != nil {
			return err
		}
	}
	if err := os.Truncate(v.Image, size); err != nil {
		return err
	}
	v.size = size
	for _, l := range loops {
		if err := l.resize(); err != nil {
			return err
		}
	}
	return nil
}

// loopsOf returns the loop devices of the attached VBDs of a VDI. h.mu is held.
func (h *Host) loopsOf(v *vdiObject) []*loopDevice {
	var loops []*loopDevice
	for _, b := range h.vbdOrder {
		if d := h.devices[b.device]; b.vdi == v.ref && b.attached && d != nil && d.loop != nil {
			loops = append(loops, d.loop)
		}
	}
	return loops
}
