package nbdtest_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

// sparse is content with holes in the middle and at the end.
func sparse(size int) []byte {
	p := nbdtest.Bytes(size, 0, 1)
	clear(p[size/3 : size/2])
	clear(p[size-size/10:])
	return p
}

// TestRAMExtents compares the extents after each kind of change.
func TestRAMExtents(t *testing.T) {
	const data, zero, hole = 0, wire.StateZero, wire.StateZero | wire.StateHole
	content := make([]byte, 4096+100)
	copy(content[1024:], nbdtest.Bytes(1024, 0, 1))
	r := nbdtest.NewRAM(content)
	expect := func(what string, off, n int64, want ...wire.Extent) {
		t.Helper()
		got, err := r.Extents(off, n)
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Errorf("%s: got error %v and (-want +got):\n%s", what, err, diff)
		}
	}
	size := r.Size()
	expect("new", 0, size, wire.Extent{Length: 1024, Status: hole}, wire.Extent{Length: 1024, Status: data}, wire.Extent{Length: 2148, Status: hole})
	expect("inside", 1000, 30, wire.Extent{Length: 24, Status: hole}, wire.Extent{Length: 6, Status: data})
	_, _ = r.WriteAt([]byte("x"), 4096)
	expect("written", 2048, size-2048, wire.Extent{Length: 2048, Status: hole}, wire.Extent{Length: 100, Status: data})
	_ = r.WriteZeroes(100, 1000, true, false)
	expect("zeroed", 0, 1536, wire.Extent{Length: 512, Status: hole}, wire.Extent{Length: 512, Status: zero}, wire.Extent{Length: 512, Status: data})
	_ = r.Trim(1024, size-1024)
	expect("trimmed", 512, size-512, wire.Extent{Length: 512, Status: zero}, wire.Extent{Length: size64(size - 1024), Status: hole})
}
