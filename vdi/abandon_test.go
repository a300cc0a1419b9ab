package vdi_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"xapi-nbd/vdi"
	"xapi-nbd/xapi/xapitest"
)

// Close gives up waiting for users: their device stays open until they have closed their Disks,
// as a read or write in flight must not use the number of a descriptor that is closed. No further
// one begins.
func TestCloseLeavesTheDeviceToItsUsers(t *testing.T) {
	for _, write := range []bool{false, true} {
		f := newFixture(t)
		var disks []*vdi.Disk
		s := f.session(xapitest.RoleVMAdmin)
		var writable *vdi.WritableDisk
		for range 2 {
			if !write {
				disks = append(disks, f.attach(s))
				continue
			}
			writable = f.attachWritable(s)
			disks = append(disks, writable.Disk)
		}
		device := filepath.Join(f.host.DeviceDir(), f.host.VBDs()[0].Device)
		if n := descriptors(t, device); n != 1 {
			t.Fatalf("%d descriptors of the device, want 1", n)
		}
		if err := f.manager.Close(canceled()); !errors.Is(err, vdi.ErrLeft) {
			t.Errorf("closing: got %v, want ErrLeft", err)
		}
		f.manager.WaitDetached()
		for i, d := range disks {
			if n := descriptors(t, device); n != 1 {
				t.Errorf("%d descriptors of the device with %d users, want 1", n, len(disks)-i)
			}
			if _, err := d.ReadAt(make([]byte, 512), 0); !errors.Is(err, vdi.ErrClosed) {
				t.Errorf("reading: got %v, want ErrClosed", err)
			}
			if write {
				if _, err := writable.WriteAt(make([]byte, 512), 0); !errors.Is(err, vdi.ErrClosed) {
					t.Errorf("writing: got %v, want ErrClosed", err)
				}
			}
			d.Close()
		}
		if n := descriptors(t, device); n != 0 {
			t.Errorf("%d descriptors of the device after the last user has left, want none", n)
		}
		f.manager = f.open()
		f.recover()
		f.closeManager()
		f.wantClean()
	}
}

// descriptors returns the number of descriptors of this process that have the file or device at
// path open.
func descriptors(t *testing.T, path string) (n int) {
	t.Helper()
	want, err := os.Stat(path)
	do(t, err)
	entries, err := os.ReadDir("/proc/self/fd")
	do(t, err)
	for _, e := range entries {
		if open, err := os.Stat(filepath.Join("/proc/self/fd", e.Name())); err == nil && os.SameFile(open, want) {
			n++
		}
	}
	return n
}
