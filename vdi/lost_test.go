package vdi_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"xapi-nbd/test/requires"
	"xapi-nbd/vdi"
	"xapi-nbd/xapi/xapitest"
)

// newNBDFixture has a host whose devices are nbdN on loop devices.
func newNBDFixture(t *testing.T) *fixture {
	t.Helper()
	requires.LoopDevices(t)
	dir := shortDir(t)
	host, err := xapitest.Start(xapitest.Config{Dir: dir, Loop: true, Style: xapitest.StyleNBD})
	if err != nil {
		t.Fatal(err)
	}
	return newFixtureOn(t, host, dir)
}

func wantEnd(t *testing.T, d *vdi.Disk) {
	t.Helper()
	select {
	case <-d.Lifetime().Done():
	case <-time.After(time.Minute):
		t.Fatal("the disk's lifetime did not end")
	}
}

// Another client of xapi unplugs a VBD in use: the connections end although they are idle,
// so that the unplug does not have to wait for the open descriptor.
func TestForeignUnplug(t *testing.T) {
	f := newNBDFixture(t)
	d := f.attach(f.session(xapitest.RoleVMAdmin))
	unplugged := make(chan error)
	go func() { unplugged <- f.host.UnplugVBD(t.Context(), f.host.VBDs()[0].UUID) }()
	wantEnd(t, d)
	if _, err := d.ReadAt(make([]byte, 512), 0); !errors.Is(err, vdi.ErrLost) {
		t.Errorf("read: got %v, want ErrLost", err)
	}
	lose(d)
	if err := <-unplugged; err != nil {
		t.Error(err)
	}
	f.closeManager()
	f.wantClean()
}

// After a foreign unplug the VDI can be attached again at once.
func TestAttachAfterForeignUnplug(t *testing.T) {
	f := newNBDFixture(t)
	s := f.session(xapitest.RoleVMAdmin)
	first := f.attach(s)
	unplugged := make(chan error)
	go func() { unplugged <- f.host.UnplugVBD(t.Context(), f.host.VBDs()[0].UUID) }()
	attached := make(chan *vdi.Disk)
	go func() {
		<-first.Lifetime().Done()
		attached <- f.attach(s) // waits for the first to end
	}()
	wantEnd(t, first)
	lose(first)
	if err := <-unplugged; err != nil {
		t.Error(err)
	}
	d := <-attached
	f.wantContent(d)
	leave(d)
	f.closeManager()
	f.wantClean()
}

// TestReboundInMidRead: a node is bound to another disk while it is being read: no byte of that
// disk is ever returned, in any order of the reads and the change.
func TestReboundInMidRead(t *testing.T) {
	f := newNBDFixture(t)
	stranger := bytes.Repeat([]byte{0xEE}, len(f.content))
	image := filepath.Join(shortDir(t), "stranger")
	if err := os.WriteFile(image, stranger, 0o600); err != nil {
		t.Fatal(err)
	}
	d := f.attach(f.session(xapitest.RoleVMAdmin))
	var readers sync.WaitGroup
	begun := make(chan struct{})
	once := sync.OnceFunc(func() { close(begun) })
	for range 4 {
		readers.Go(func() {
			p := make([]byte, 64<<10)
			for off := int64(0); ; off = (off + int64(len(p))) % d.Size() {
				n, err := d.ReadAt(p, off)
				if errors.Is(err, vdi.ErrLost) {
					if !bytes.Equal(p, make([]byte, len(p))) {
						t.Error("a failed read left data behind")
					}
					return
				}
				if err != nil || !bytes.Equal(p[:n], f.content[off:off+int64(n)]) {
					t.Errorf("read at %d: %v, or bytes of the other disk", off, err)
					return
				}
				once()
			}
		})
	}
	<-begun
	do(t, f.host.Rebind(f.host.VBDs()[0].UUID, image))
	readers.Wait()
	// Without the check of the binding the other disk would be read.
	wantEnd(t, d)
	lose(d)
	f.closeManager()
	f.wantClean()
}

// A new client is the first to find that the device was taken away.
func TestJoinOfALostDevice(t *testing.T) {
	f := newNBDFixture(t)
	s := f.session(xapitest.RoleVMAdmin)
	d := f.attach(s)
	image := filepath.Join(shortDir(t), "stranger")
	if err := os.WriteFile(image, make([]byte, len(f.content)), 0o600); err != nil {
		t.Fatal(err)
	}
	do(t, f.host.Rebind(f.host.VBDs()[0].UUID, image))
	attached := make(chan *vdi.Disk)
	go func() { attached <- f.attach(s) }()
	wantEnd(t, d)
	lose(d)
	d = <-attached
	f.wantContent(d)
	leave(d)
	f.closeManager()
	f.wantClean()
}

// The size of an export is that at its beginning.
func TestResize(t *testing.T) {
	f := newNBDFixture(t)
	s := f.session(xapitest.RoleVMAdmin)
	before := f.attach(s)
	do(t, f.host.ResizeVDI(f.vdi, 2<<20))
	if got := before.Size(); got != 1<<20 {
		t.Errorf("size of the old connection: got %d, want %d", got, 1<<20)
	}
	f.wantContent(before)
	after := f.attach(s)
	if got := after.Size(); got != 2<<20 {
		t.Errorf("size of the new connection: got %d, want %d", got, 2<<20)
	}
	leave(before)
	leave(after)
	f.closeManager()
	f.wantClean()
}

// Another client of xapi unplugs the VBD between the plug and the opening of its node, and
// the node is bound to another VDI: that one is not served under the wrong name.
func TestNodeIsReboundBeforeItIsOpened(t *testing.T) {
	f := newNBDFixture(t)
	other := f.addVDI(xapitest.VDISpec{Size: int64(len(f.content))})
	foreign, err := f.host.AddForeignVBD(other, nil)
	do(t, err)
	var once sync.Once
	f.host.OnCall(func(c xapitest.CallPoint) xapitest.Verdict {
		if c.Method == "VBD.get_record" && c.After {
			once.Do(func() {
				for _, v := range f.host.VBDs() {
					if !v.Foreign {
						do(t, f.host.UnplugVBD(context.Background(), v.UUID))
					}
				}
				do(t, f.host.PlugForeign(foreign))
			})
		}
		return xapitest.Proceed
	})
	if _, err := f.manager.Attach(t.Context(), f.session(xapitest.RoleVMAdmin), f.vdi); !errors.Is(err, vdi.ErrLost) {
		t.Fatalf("got %v, want ErrLost", err)
	}
	f.host.OnCall(nil)
	d := f.attach(f.session(xapitest.RoleVMAdmin)) // on the next node
	f.wantContent(d)
	leave(d)
	f.closeManager()
	f.wantClean()
}
