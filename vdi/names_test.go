package vdi_test

import (
	"context"
	"testing"
	"time"

	"xapi-nbd/xapi/xapitest"
)

// xapi is asked for the name of the VM by NameVMs, once, and never by Attach.
func TestNameVMs(t *testing.T) {
	f := newFixture(t)
	f.vdi = f.addVDI(xapitest.VDISpec{Size: 1 << 20, NameLabel: "root", VMName: "web1"})
	f.manager.NameVMs(t.Context()) // of nothing
	d := f.attach(f.session(xapitest.RoleVMAdmin))
	defer d.Close()
	want := func(vm string, calls int) {
		t.Helper()
		got := f.manager.Status()[0]
		if got.VDIName != "root" || got.VMName != vm || got.Size != 1<<20 {
			t.Errorf("got %+v, want the VM %q", got, vm)
		}
		if n := f.count("VBD.get_VM") + f.count("VM.get_name_label"); n != calls {
			t.Errorf("%d calls for the name, want %d", n, calls)
		}
	}
	want("", 0)
	for range 3 {
		f.manager.NameVMs(t.Context())
		want("web1", 2)
		f.manager.ForgetVMNameFailures()
	}
	d.Close()
	f.closeManager()
	f.wantClean()
}

// A VDI without a VM, and one whose VM has gone, have no name, which is no error and
// is not asked for again.
func TestNameVMsWithoutVM(t *testing.T) {
	for _, gone := range []bool{false, true} {
		f := newFixture(t)
		if gone {
			f.vdi = f.addVDI(xapitest.VDISpec{Size: 1 << 20, VMName: "web1"})
			f.host.FailAlways("VM.get_name_label", "HANDLE_INVALID", "VM", "OpaqueRef:x")
		}
		d := f.attach(f.session(xapitest.RoleVMAdmin))
		for range 2 {
			f.manager.NameVMs(t.Context())
			f.manager.ForgetVMNameFailures()
		}
		if got := f.manager.Status()[0]; got.VMName != "" {
			t.Errorf("VM gone %v: got %q", gone, got.VMName)
		}
		if n := f.count("VBD.get_VM"); gone && n != 1 || !gone && n != 0 {
			t.Errorf("VM gone %v: asked %d times", gone, n)
		}
		d.Close()
		f.closeManager()
		f.wantClean()
	}
}

// If xapi does not respond, NameVMs returns at the end of its context, and Attach does not
// wait for it. xapi is not asked again at once.
func TestNameVMsOfAHangingXapi(t *testing.T) {
	f := newFixture(t)
	f.vdi = f.addVDI(xapitest.VDISpec{Size: 1 << 20, VMName: "web1"})
	d := f.attach(f.session(xapitest.RoleVMAdmin))
	release := f.host.Block("VBD.get_VM")
	defer release()
	ctx, cancel := context.WithCancel(t.Context())
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		f.manager.NameVMs(ctx)
	}()
	f.wait("the question", f.called("VBD.get_VM", 1))
	f.manager.NameVMs(t.Context()) // returns at once
	f.attach(f.session(xapitest.RoleVMAdmin)).Close()
	cancel()
	select {
	case <-asked:
	case <-time.After(time.Minute):
		t.Fatal("the end of the context does not end the call")
	}
	f.manager.NameVMs(t.Context())
	if n := f.count("VBD.get_VM"); n != 1 {
		t.Errorf("asked %d times, want once", n)
	}
	release()
	f.manager.ForgetVMNameFailures()
	f.manager.NameVMs(t.Context())
	if got := f.manager.Status()[0].VMName; got != "web1" {
		t.Errorf("when xapi answers again: got %q", got)
	}
	d.Close()
	f.closeManager()
	f.wantClean()
}
