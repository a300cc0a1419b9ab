package changes_test

import (
	"context"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"xapi-nbd/vdi/changes"
	"xapi-nbd/vdi/vhd"
	"xapi-nbd/vdi/vhd/vhdtest"
	"xapi-nbd/xapi"
)

const (
	kib = 1 << 10
	mib = 1 << 20
)

// allocated returns a disk of size bytes that has those blocks of 2 MiB.
func allocated(t interface{ Fatal(...any) }, size int64, blocks ...int64) *vhd.BlockSet {
	// Images have whole blocks; the disk may be shorter.
	storage := &vhdtest.Memory{}
	whole := (size + vhdtest.BlockSize - 1) / vhdtest.BlockSize * vhdtest.BlockSize
	w, err := vhdtest.Create(storage, vhdtest.Options{Size: whole})
	if err != nil {
		t.Fatal(err)
	}
	for _, block := range blocks {
		if err := w.WriteSectors(make([]byte, 512), block*vhdtest.BlockSize); err != nil {
			t.Fatal(err)
		}
	}
	set := vhd.NewBlockSet(size)
	img, err := vhd.Parse(storage)
	if err != nil {
		t.Fatal(err)
	}
	if err := img.AddBlocks(context.Background(), storage, set); err != nil {
		t.Fatal(err)
	}
	return set
}

type extents = []changes.Extent

func TestContexts(t *testing.T) {
	const size = 4 * mib
	changed := xapi.NewChangedBlocks
	block0 := allocated(t, size, 0)
	// Of 64 blocks of 64 KiB: 0, 2 and 9, as real tools wrote them; 31 to 33.
	some, across := []byte{0xa0, 0x40, 0, 0, 0, 0, 0, 0}, []byte{0, 0, 0, 0x01, 0xc0, 0, 0, 0}
	none, all := make([]byte, 8), []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	tests := []struct {
		name             string
		m                changes.Map
		off, n           int64
		dirty, unchanged extents
	}{
		{"nothing changed", changes.Map{Changed: changed(size, none), Allocated: block0}, 0, size, extents{{size, 0}}, extents{{size, 1}}},
		{"all changed", changes.Map{Changed: changed(size, all), Allocated: block0}, 0, size, extents{{size, 1}}, extents{{2 * mib, 0}, {2 * mib, 2}}},
		{"all changed, map unknown", changes.Map{Changed: changed(size, all)}, 0, size, extents{{size, 1}}, extents{{size, 0}}},
		{"some changed", changes.Map{Changed: changed(size, some), Allocated: block0}, 0, size,
			extents{{64 * kib, 1}, {64 * kib, 0}, {64 * kib, 1}, {6 * 64 * kib, 0}, {64 * kib, 1}, {54 * 64 * kib, 0}},
			extents{{64 * kib, 0}, {64 * kib, 1}, {64 * kib, 0}, {6 * 64 * kib, 1}, {64 * kib, 0}, {54 * 64 * kib, 1}}},
		{"some changed to zeroes", changes.Map{Changed: changed(size, some), Allocated: allocated(t, size, 1)}, 0, 192 * kib,
			extents{{64 * kib, 1}, {64 * kib, 0}, {64 * kib, 1}}, extents{{64 * kib, 2}, {64 * kib, 1}, {64 * kib, 2}}},
		{"a changed run that ends in a hole", changes.Map{Changed: changed(size, across), Allocated: block0}, mib, 2 * mib,
			extents{{960 * kib, 0}, {192 * kib, 1}, {896 * kib, 0}}, extents{{960 * kib, 1}, {64 * kib, 0}, {128 * kib, 2}, {896 * kib, 1}}},
		{"within a block", changes.Map{Changed: changed(size, some), Allocated: block0}, 60 * kib, 8 * kib,
			extents{{4 * kib, 1}, {4 * kib, 0}}, extents{{4 * kib, 0}, {4 * kib, 1}}},
		{"bitmap too short", changes.Map{Changed: changed(size, none[:4]), Allocated: allocated(t, size, 1)}, 0, size,
			extents{{2 * mib, 0}, {2 * mib, 1}}, extents{{2 * mib, 1}, {2 * mib, 0}}},
		{"disk larger than both", changes.Map{Changed: changed(2*mib, all[:4]), Allocated: allocated(t, 2*mib)}, 0, size,
			extents{{size, 1}}, extents{{2 * mib, 2}, {2 * mib, 0}}},
		{"nothing asked", changes.Map{Changed: changed(size, all)}, mib, 0, nil, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.dirty, tt.m.Dirty(tt.off, tt.n)); diff != "" {
				t.Errorf("dirty bitmap (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.unchanged, tt.m.Unchanged(tt.off, tt.n)); diff != "" {
				t.Errorf("unchanged (-want +got):\n%s", diff)
			}
		})
	}
}

// One result has at most 4096 extents; the next one goes on where it ends.
func TestExtentsAreBounded(t *testing.T) {
	const size = 1 << 30
	bitmap := make([]byte, size/xapi.ChangedBlockSize/8)
	for i := range bitmap {
		bitmap[i] = 0x55
	}
	m := changes.Map{Changed: xapi.NewChangedBlocks(size, bitmap)}
	var off int64
	for _, want := range []int{4096, 4096, 4096, 4096, 0} {
		got := m.Unchanged(off, size-off)
		if len(got) != want {
			t.Fatalf("at %d: got %d extents, want %d", off, len(got), want)
		}
		for _, e := range got {
			off += e.Length
		}
	}
}

// countedSet counts the calls of Run.
type countedSet struct {
	changes.Set
	calls int
}

func (s *countedSet) Run(off, limit int64) (bool, int64) {
	s.calls++
	return s.Set.Run(off, limit)
}

// TestLongRunsAreSearchedOnce has a changed run with many extents in it: a bitmap may be
// megabytes long, and one request must not search it for each of them.
func TestLongRunsAreSearchedOnce(t *testing.T) {
	const size = 64 * 2 * mib
	var even []int64
	for block := int64(0); block < 64; block += 2 {
		even = append(even, block)
	}
	changed := &countedSet{Set: xapi.NewChangedBlocks(size, nil)}
	m := changes.Map{Changed: changed, Allocated: allocated(t, size, even...)}
	if got := m.Unchanged(0, size); len(got) != 64 {
		t.Errorf("got %d extents, want 64", len(got))
	}
	if changed.calls != 1 {
		t.Errorf("the changed blocks were searched %d times, want once", changed.calls)
	}
}

// The extents have the same status for each sector as a lookup of that sector alone.
func TestExtentsAgainstReference(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const sector = 512
		size := sector * rapid.Int64Range(1, 9*mib/sector).Draw(t, "size")
		changedSize := sector * rapid.Int64Range(1, size/sector).Draw(t, "changed size")
		allocatedSize := sector * rapid.Int64Range(1, size/sector).Draw(t, "allocated size")
		part := rapid.SampledFrom([]byte{0, 0, 0xff, 0xff, 0x01, 0x80, 0x5a})
		bitmap := rapid.SliceOfN(part, 0, int(changedSize/xapi.ChangedBlockSize/8)+1).Draw(t, "bitmap")
		blocks := rapid.SliceOfDistinct(rapid.Int64Range(0, (allocatedSize-1)/vhdtest.BlockSize), rapid.ID).Draw(t, "blocks")
		m := changes.Map{Changed: xapi.NewChangedBlocks(changedSize, bitmap)}
		hasMap := rapid.Bool().Draw(t, "has a map")
		if hasMap {
			m.Allocated = allocated(t, allocatedSize, blocks...)
		}
		off := rapid.Int64Range(0, size-1).Draw(t, "off")
		n := rapid.Int64Range(1, size-off).Draw(t, "n")

		changed := func(at int64) bool {
			block := at / xapi.ChangedBlockSize
			return at >= changedSize || block/8 >= int64(len(bitmap)) || bitmap[block/8]&(0x80>>(block%8)) != 0
		}
		hasData := func(at int64) bool {
			if !hasMap || at >= allocatedSize {
				return true
			}
			for _, b := range blocks {
				if b == at/vhdtest.BlockSize {
					return true
				}
			}
			return false
		}
		check(t, m.Dirty(off, n), off, n, func(at int64) uint64 {
			if changed(at) {
				return 1
			}
			return 0
		})
		check(t, m.Unchanged(off, n), off, n, func(at int64) uint64 {
			switch {
			case !changed(at):
				return 1
			case hasData(at):
				return 0
			default:
				return 2
			}
		})
	})
}

// check compares extents with the status of each sector.
func check(t *rapid.T, got extents, off, n int64, want func(at int64) uint64) {
	at := off
	for i, e := range got {
		if e.Length <= 0 || i > 0 && got[i-1].Status == e.Status {
			t.Fatalf("extent %d of %v is empty or like the one before", i, got)
		}
		for end := at + e.Length; at < end; at = min(end, (at/512+1)*512) {
			if want(at) != e.Status {
				t.Fatalf("extents %v from %d on: at %d got status %d, want %d", got, off, at, e.Status, want(at))
			}
		}
	}
	if at != off+n {
		t.Fatalf("extents %v from %d on end at %d, want %d", got, off, at, off+n)
	}
}
