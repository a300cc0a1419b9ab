package copying

import (
	"context"
	"testing"

	"pgregory.net/rapid"

	"xapi-nbd/cmd/nbd-tool/internal/extents"
	"xapi-nbd/nbd/wire"
)

// TestPlanOfChanges carries out random plans on a model of one byte for each 512: the
// copy is the source afterwards, also where the copy was too short, and requests that are
// not for data keep to the blocks of both ends.
func TestPlanOfChanges(t *testing.T) {
	const sector = 512
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 300).Draw(t, "sectors")
		srcUnit := int64(1) << rapid.IntRange(0, 14).Draw(t, "source unit")
		dstUnit := int64(1) << rapid.IntRange(0, 14).Draw(t, "destination unit")
		size := int64(n) * sector
		limit := size
		if rapid.Bool().Draw(t, "short") {
			limit = int64(rapid.IntRange(0, n).Draw(t, "limit")) * sector
		}
		now, dst, state := make([]byte, n), make([]byte, n), make([]uint64, n)
		for i := 0; i < n; {
			s := rapid.SampledFrom([]uint64{0, extents.StateUnchanged, extents.StateZeroNow}).Draw(t, "state")
			for end := i + rapid.IntRange(1, 40).Draw(t, "length"); i < n && i < end; i++ {
				state[i], now[i] = s, byte(1+i%7)
				dst[i] = 0xbb
				switch s {
				case extents.StateUnchanged:
					dst[i] = now[i]
				case extents.StateZeroNow:
					now[i] = 0
				}
			}
		}
		clear(dst[limit/sector:])
		most := rapid.IntRange(1, 5).Draw(t, "extents in an answer")
		changed := &Changes{
			ask: func(_ context.Context, off, n int64) ([]wire.Extent, error) {
				var answer []wire.Extent
				for end := off + n; off < end && len(answer) < most; {
					to := off
					for to < size && state[to/sector] == state[off/sector] {
						to = (to/sector + 1) * sector
					}
					answer = append(answer, wire.Extent{Length: uint64(min(to, end) - off), Status: state[off/sector]})
					off = to
				}
				return answer, nil
			},
			kindOf: func(state uint64) taskKind {
				return map[uint64]taskKind{0: copyData, extents.StateUnchanged: leaveAsIs, extents.StateZeroNow: makeZero}[state]
			},
		}
		changed.CopyFrom(limit)
		c := New(&planEnd{bytes: size, block: srcUnit}, &planEnd{bytes: size, block: dstUnit}, Options{Changes: changed})
		last := int64(0)
		err := c.plan(t.Context(), 0, size, func(task task) error {
			if task.off < last || task.off+task.n > size || task.n <= 0 {
				t.Fatalf("task %+v after %d of %d bytes", task, last, size)
			}
			last = task.off + task.n
			if task.off%max(srcUnit, dstUnit) != 0 || last%dstUnit != 0 && last != size || task.zero && last%dstUnit != 0 {
				t.Fatalf("task %+v is not of whole blocks of %d and %d", task, srcUnit, dstUnit)
			}
			for i := task.off / sector; i < (last+sector-1)/sector; i++ {
				dst[i] = now[i]
				if task.zero {
					dst[i] = 0
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		for i := range now {
			if dst[i] != now[i] {
				t.Fatalf("sector %d, state %d: got %d, want %d", i, state[i], dst[i], now[i])
			}
		}
	})
}
