package vdi_test

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"xapi-nbd/vdi"
	"xapi-nbd/xapi/xapitest"
)

// wantSizeError requires that attaching is refused with both sizes.
func (f *fixture) wantSizeError(device, virtual int64) {
	f.t.Helper()
	d, err := f.manager.Attach(f.t.Context(), f.session(xapitest.RoleVMAdmin), f.vdi)
	if err == nil {
		f.t.Errorf("attached, with %d bytes", d.Size())
		d.Close()
	}
	var size *vdi.SizeError
	if !errors.As(err, &size) || *size != (vdi.SizeError{Device: device, Virtual: virtual}) {
		f.t.Errorf("got %v, want a refusal with %d and %d bytes", err, device, virtual)
	}
}

// A device that is smaller than its VDI is not served: the backup would be incomplete without
// an error.
func TestDeviceSmallerThanItsVDI(t *testing.T) {
	for _, virtual := range []int64{1<<20 + 512, 2 << 20, 1 << 50, 0} {
		f := newFixture(t)
		f.host.SetVirtualSize(f.vdi, virtual)
		f.wantSizeError(1<<20, virtual)
		f.closeManager()
		f.wantClean()
	}
}

// Of a device that is larger than its VDI, because LVM rounds up, only the VDI is served.
func TestDeviceLargerThanItsVDI(t *testing.T) {
	for _, size := range []int{1<<20 - 512, 512 << 10, 1000} {
		f := newFixture(t)
		f.host.SetVirtualSize(f.vdi, int64(size))
		d := f.attach(f.session(xapitest.RoleVMAdmin))
		if got := d.Size(); got != int64(size) {
			t.Errorf("size: got %d, want the VDI's %d", got, size)
		}
		if unit, _, _ := d.BlockSizes(); int64(size)%int64(unit) != 0 {
			t.Errorf("size %d is no multiple of the minimum block size %d", size, unit)
		}
		got := make([]byte, size+512)
		n, err := d.ReadAt(got, 0)
		if n != size || !errors.Is(err, io.EOF) || !bytes.Equal(got[:n], f.content[:n]) {
			t.Errorf("read beyond the VDI: got %d bytes, %v, want %d and EOF", n, err, size)
		}
		if n, err := d.ReadAt(got, int64(size)+1); n != 0 || !errors.Is(err, io.EOF) {
			t.Errorf("read behind the VDI: got %d bytes, %v, want EOF", n, err)
		}
		leave(d)
		f.closeManager()
		f.wantClean()
	}
}

// The size may change while a VDI is attached. Each new connection gets the current size, or
// is refused; the old ones keep theirs.
func TestResizeWhileAttached(t *testing.T) {
	tests := []struct {
		name   string
		change func(*fixture) error
		size   int64 // of a new connection; 0: refused
		device int64
	}{
		{"VDI grows", func(f *fixture) error { f.host.SetVirtualSize(f.vdi, 2<<20); return nil }, 0, 1 << 20},
		{"device grows", func(f *fixture) error { return f.host.ResizeDevice(f.vdi, 2<<20) }, 1 << 20, 2 << 20},
		{"both grow", func(f *fixture) error { return f.host.ResizeVDI(f.vdi, 2<<20) }, 2 << 20, 2 << 20},
		{"device shrinks", func(f *fixture) error { return f.host.ResizeDevice(f.vdi, 512<<10) }, 0, 512 << 10},
		{"device vanishes", func(f *fixture) error { return f.host.ResizeDevice(f.vdi, 0) }, 0, 0},
		{"both shrink", func(f *fixture) error { return f.host.ResizeVDI(f.vdi, 512<<10) }, 512 << 10, 512 << 10},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(t)
			before := f.attach(f.session(xapitest.RoleVMAdmin))
			do(t, tt.change(f))
			if got := before.Size(); got != 1<<20 {
				t.Errorf("size of the old connection: got %d, want %d", got, 1<<20)
			}
			f.readsUntil(before, min(tt.device, 1<<20))
			if tt.size == 0 {
				virtual := int64(1 << 20)
				if tt.name == "VDI grows" {
					virtual = 2 << 20
				}
				f.wantSizeError(tt.device, virtual)
			} else {
				after := f.attach(f.session(xapitest.RoleVMAdmin))
				if got := after.Size(); got != tt.size {
					t.Errorf("size of the new connection: got %d, want %d", got, tt.size)
				}
				leave(after)
			}
			if before.Lifetime().Err() != nil {
				t.Error("the old connection was ended")
			}
			f.readsUntil(before, min(tt.device, 1<<20))
			leave(before)
			f.closeManager()
			f.wantClean()
		})
	}
}

// readsUntil requires that a read across end returns the content before end and an error.
func (f *fixture) readsUntil(d *vdi.Disk, end int64) {
	f.t.Helper()
	got := make([]byte, d.Size())
	n, err := d.ReadAt(got, 0)
	if int64(n) != end || (err == nil) != (end == d.Size()) || !bytes.Equal(got[:n], f.content[:n]) {
		f.t.Errorf("read: got %d bytes, %v, want the first %d", n, err, end)
	}
}
