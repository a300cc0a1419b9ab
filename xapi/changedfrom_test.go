package xapi

import (
	"slices"
	"testing"
)

// TestChangedFrom marks all blocks from some place on, of bitmaps of every length.
func TestChangedFrom(t *testing.T) {
	const block = ChangedBlockSize
	bitmap := []byte{0x81, 0x00, 0x01} // blocks 0, 7 and 23 of 23 and a half
	size := int64(23*block + block/2)
	changed := func(c *ChangedBlocks) (blocks []int64) {
		for b := int64(0); b*block < size; b++ {
			if is, _ := c.Run(b*block, 1); is {
				blocks = append(blocks, b)
			}
		}
		return blocks
	}
	for from := int64(0); from <= size+block; from += block / 4 {
		var want []int64
		for b := int64(0); b < 24; b++ {
			if b == 0 || b == 7 || b == 23 || from < size && b >= from/block {
				want = append(want, b)
			}
		}
		c := NewChangedBlocks(size, bitmap)
		if got := changed(c.ChangedFrom(from)); !slices.Equal(got, want) {
			t.Errorf("from %d: got the blocks %d, want %d", from, got, want)
		}
		if got := changed(c); !slices.Equal(got, []int64{0, 7, 23}) {
			t.Fatalf("from %d: the original has become %d", from, got)
		}
	}
}
