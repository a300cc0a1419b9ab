package copying

import (
	"context"
	"math/rand/v2"
	"testing"

	"xapi-nbd/cmd/nbd-tool/internal/extents"
	"xapi-nbd/nbd/wire"
)

// planEnd is an end with only the methods that plan calls.
type planEnd struct {
	End
	bytes, block int64
	state        []uint64 // of each 100 bytes
	r            *rand.Rand
}

func (p *planEnd) Size() int64 { return p.bytes }
func (p *planEnd) Unit() int64 { return p.block }

// Extents returns results as servers may: shorter or longer than requested, or in pieces.
func (p *planEnd) Extents() extents.Asker {
	if p.state == nil {
		return nil
	}
	return func(_ context.Context, off, _ int64) ([]wire.Extent, error) {
		answer := []wire.Extent{{Length: uint64(100 - off%100), Status: p.state[off/100]}}
		for i := off/100 + 1; i < int64(len(p.state)) && p.r.IntN(10) > 0; i++ {
			answer = append(answer, wire.Extent{Length: 100, Status: p.state[i]})
		}
		if p.r.IntN(20) == 0 {
			answer[0].Length = 0 // nonsense
		}
		return answer, nil
	}
}

// Tasks follow on from each other, cover the source, fit the units, and are
// zero only where the source is.
func TestPlan(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 0))
		src := &planEnd{bytes: r.Int64N(3 << 20), block: 1 << r.IntN(10), r: r}
		dst := &planEnd{bytes: src.bytes, block: 1 << r.IntN(14)}
		if r.IntN(10) > 0 {
			state := uint64(0)
			for range src.bytes/100 + 1 {
				if r.IntN(200) == 0 {
					state = r.Uint64N(4)
				}
				src.state = append(src.state, state)
			}
		}
		c := New(src, dst, Options{})
		next := int64(0)
		err := c.plan(t.Context(), 0, src.Size(), func(task task) error {
			if task.off != next || task.n <= 0 || task.n > chunkSize && !task.zero {
				t.Fatalf("seed %d: got task %+v, want one from %d on", seed, task, next)
			}
			next = task.off + task.n
			if task.off%dst.block != 0 || next%dst.block != 0 && next != src.bytes {
				t.Fatalf("seed %d: task %+v has no whole blocks of %d", seed, task, dst.block)
			}
			if task.zero && next%dst.block != 0 {
				t.Fatalf("seed %d: zero task %+v has no whole blocks of %d", seed, task, dst.block)
			}
			for at := task.off; task.zero && at < next; at++ {
				if src.state[at/100]&wire.StateZero == 0 {
					t.Fatalf("seed %d: task %+v zeroes data at %d", seed, task, at)
				}
			}
			return nil
		})
		if err != nil || next != src.bytes {
			t.Errorf("seed %d: error %v, planned up to %d of %d", seed, err, next, src.bytes)
		}
	}
}
