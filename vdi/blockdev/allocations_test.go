//go:build !race

// The race detector allocates by itself.

package blockdev

import "testing"

// The check after every read allocates no memory.
func TestNoAllocationsInCheckBinding(t *testing.T) {
	n := newNode(t, true, true)
	d, err := Open(t.Context(), n.path, Options{Roots: n.roots})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if allocs := testing.AllocsPerRun(100, func() { _ = d.CheckBinding() }); allocs != 0 {
		t.Errorf("got %v allocations, want 0", allocs)
	}
}
