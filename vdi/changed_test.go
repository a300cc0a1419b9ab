package vdi_test

import (
	"slices"
	"testing"

	"xapi-nbd/vdi/changes"
)

// TestChangedBlocksOfAGrownDisk: the base has no content where the disk has grown, so
// that part has changed even if nobody wrote there.
func TestChangedBlocksOfAGrownDisk(t *testing.T) {
	f := newChangedFixture(t)
	do(t, f.host.ResizeVDI(f.live, 12*blockSize))
	f.write(9)
	f.base, f.vdi = f.vdi, f.snapshot()
	d := f.attachSince(f.base)
	m, ok := d.Changes(f.base)
	if !ok {
		t.Fatal("the changed blocks are not known")
	}
	want := []changes.Extent{
		{Length: 8 * blockSize, Status: changes.Unchanged}, {Length: blockSize, Status: changes.ChangedToZero},
		{Length: blockSize}, {Length: 2 * blockSize, Status: changes.ChangedToZero},
	}
	if got := m.Unchanged(0, d.Size()); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	want = []changes.Extent{{Length: 8 * blockSize}, {Length: 4 * blockSize, Status: changes.Dirty}}
	if got := m.Dirty(0, d.Size()); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	leave(d)
	f.closeManager()
}

// TestChangedBlocksSinceABaseWithoutData: its record has the size of its log, which says
// nothing of the disk.
func TestChangedBlocksSinceABaseWithoutData(t *testing.T) {
	f := newChangedFixture(t)
	do(t, f.host.DataDestroy(t.Context(), f.base))
	f.host.SetVirtualSize(f.base, 4096)
	d := f.attachSince(f.base)
	m, _ := d.Changes(f.base)
	if got := dirty(m, d.Size()); !equal(got, 5*32, 6*32) {
		t.Errorf("got the blocks %d, want 160 and 192", got)
	}
	leave(d)
	f.closeManager()
}

// TestChangedBlocksOfASnapshotOnly: another VDI can be written to between the answer of
// xapi and the plug.
func TestChangedBlocksOfASnapshotOnly(t *testing.T) {
	f := newChangedFixture(t)
	f.vdi = f.live
	d := f.attachSince(f.base)
	if _, known := d.Changes(f.base); known || d.KnowsChanges(f.base) {
		t.Error("changed blocks of a VDI that is no snapshot are known")
	}
	if n := f.count("VDI.list_changed_blocks"); n != 0 {
		t.Errorf("%d calls of VDI.list_changed_blocks, want none", n)
	}
	leave(d)
	f.closeManager()
}
