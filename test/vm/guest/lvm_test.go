package guest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"xapi-nbd/nbd/wire"
	"xapi-nbd/vdi/allocation"
	"xapi-nbd/vdi/vhd"
	"xapi-nbd/vdi/vhd/vhdtest"
)

// lvmBlocks is the size of the disk of testXenLVM in blocks of 2 MiB.
const lvmBlocks = 10

// testXenLVM has the images of a VDI on logical volumes, with the names that SM gives
// them: SM's link leads to the folder of the volume group, and the locators name nodes of
// device-mapper. The service maps the chain; without one of its volumes all is data.
func testXenLVM(t *testing.T) {
	must(t, "modprobe", "dm-mod")
	w := newXenWorld(t)
	s := w.start()
	data := make([]byte, lvmBlocks*vhdtest.BlockSize)
	for _, block := range []int{1, 4, 7} {
		copy(data[block*vhdtest.BlockSize:], diskContent(uint64(block), 512)[:vhdtest.BlockSize])
	}
	vdi := w.addVDI(data, 512)
	// The host's link has the names; the service looks for it in the real /dev.
	path := strings.Split(w.host.LinkPath(vdi), "/")
	g := newVolumeGroup(t, path[len(path)-2])

	base2 := g.addImage(t, "VHD-base-2", vhdtest.Options{UUID: [16]byte{3}, Hidden: true}, data, 7)
	base1 := g.addImage(t, "VHD-base-1", vhdtest.Options{
		UUID: [16]byte{2}, Hidden: true, Differencing: true, ParentUUID: [16]byte{3}, ParentName: base2,
	}, data, 4)
	g.addImage(t, "VHD-"+vdi, vhdtest.Options{UUID: [16]byte{1}, Differencing: true, ParentUUID: [16]byte{2}, ParentName: base1}, data, 1)
	link := filepath.Join("/dev/sm/phy", g.sr, vdi)
	if err := errors.Join(os.MkdirAll(filepath.Dir(link), 0o755), os.Symlink("/dev/"+g.name+"/VHD-"+vdi, link)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll("/dev/sm") })

	source := allocation.Source{Link: link, Key: vdi, MapperDir: "/dev/mapper", Size: int64(len(data))}
	set, err := allocation.Read(t.Context(), source)
	if err != nil {
		t.Fatal(err)
	}
	for block := range int64(lvmBlocks) {
		in, _ := set.Run(block*vhd.BlockSize, 1)
		if want := block == 1 || block == 4 || block == 7; in != want {
			t.Errorf("block %d: has data %t, want %t", block, in, want)
		}
	}
	wantHoles := func(want int) {
		t.Helper()
		conn, holes := w.open(t, s, vdi, wire.BaseAllocation), 0
		for e, err := range conn.Extents(t.Context(), wire.BaseAllocation, 0, int64(len(data))) {
			if err != nil {
				t.Fatal(err)
			}
			if e.Status == wire.StateHole|wire.StateZero {
				holes += int(e.Length)
			}
		}
		if holes != want {
			t.Errorf("holes: got %d bytes, want %d", holes, want)
		}
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		w.waitClean(t, s)
	}
	wantHoles((lvmBlocks - 3) * vhdtest.BlockSize)
	wantSame(t, "pulled", w.pull(t, s, vdi, "nbdcopy"), data)
	w.waitClean(t, s)

	g.lvm(t, "lvchange", "-an", g.name+"/VHD-base-1")
	if set, err := allocation.Read(t.Context(), source); !errors.Is(err, allocation.ErrUnknown) || allocation.Reason(err) != "image" {
		t.Errorf("without a volume of the chain: got %v, %v, want the reason image", set, err)
	}
	wantHoles(0)
	wantSame(t, "pulled", w.pull(t, s, vdi, "nbdcopy"), data)
	w.waitClean(t, s)
	g.remove(t)
	wantNoXenDisks(t)
	s.stop()
}

// volumeGroup is that of an SR.
type volumeGroup struct{ sr, name, loop string }

// newVolumeGroup makes a volume group on a loop device.
func newVolumeGroup(t *testing.T, sr string) *volumeGroup {
	t.Helper()
	t.Setenv("DM_DISABLE_UDEV", "1") // there is none: LVM makes the nodes itself
	image := filepath.Join(t.TempDir(), "volume")
	f, err := os.Create(image)
	if err == nil {
		err = errors.Join(f.Truncate(256<<20), f.Close())
	}
	g := &volumeGroup{sr: sr, name: "VG_XenStorage-" + sr}
	if err == nil {
		g.loop, err = attachLoop(t.Context(), image, false, 512)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = detachLoop(context.WithoutCancel(t.Context()), g.loop) })
	g.lvm(t, "vgcreate", g.name, g.loop)
	return g
}

// lvm runs a command of LVM.
func (g *volumeGroup) lvm(t *testing.T, command string, args ...string) {
	t.Helper()
	must(t, "lvm", append([]string{command, "--yes", "--config", "activation{udev_sync=0 udev_rules=0 monitoring=0} devices{use_devicesfile=0}"}, args...)...)
}

// addImage makes a VHD image with some blocks of data on a new logical volume, and
// returns the name of its node in /dev/mapper.
func (g *volumeGroup) addImage(t *testing.T, volume string, o vhdtest.Options, data []byte, blocks ...int64) (node string) {
	t.Helper()
	g.lvm(t, "lvcreate", "--zero", "n", "--wipesignatures", "n", "--size", "32m", "--name", volume, g.name)
	double := func(name string) string { return strings.ReplaceAll(name, "-", "--") }
	node = double(g.name) + "-" + double(volume)
	f, err := os.OpenFile(filepath.Join("/dev/mapper", node), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	o.Size, o.OriginalSize, o.ReservedEntries = lvmBlocks*vhdtest.BlockSize, vhdtest.BlockSize, 1<<20
	img, err := vhdtest.Create(f, o)
	for _, block := range blocks {
		if err == nil {
			err = img.WriteSectors(data[block*vhdtest.BlockSize:][:vhdtest.BlockSize], block*vhdtest.BlockSize)
		}
	}
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
	return node
}

// remove removes the volume group and its loop device.
func (g *volumeGroup) remove(t *testing.T) {
	t.Helper()
	g.lvm(t, "vgremove", "--force", g.name)
	if err := detachLoop(t.Context(), g.loop); err != nil {
		t.Error(err)
	}
}
