package mirror

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// TestBitmap compares bitmaps with slices.
func TestBitmap(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for _, size := range []int64{1, 63, 64, 65, 4096, 10000} {
		maps := [2]bitmap{newBitmap(size), newBitmap(size)}
		models := [2][]bool{make([]bool, size), make([]bool, size)}
		for range 300 {
			b, model := &maps[rng.IntN(2)], models[0]
			if b == &maps[1] {
				model = models[1]
			}
			begin := rng.Int64N(size)
			end := begin + 1 + rng.Int64N(min(size-begin, 1+rng.Int64N(size)))
			switch rng.IntN(8) {
			case 0:
				b.clear()
				clear(model)
			case 1:
				maps[0].add(&maps[1])
				for i, member := range models[1] {
					models[0][i] = models[0][i] || member
				}
			default:
				member := rng.IntN(2) == 0
				b.put(begin, end, member)
				for i := begin; i < end; i++ {
					model[i] = member
				}
			}
			from := rng.Int64N(size + 1)
			want := int64(slices.Index(model[from:], true))
			if want >= 0 {
				want += from
			}
			if got := b.next(from); got != want {
				t.Fatalf("size %d: next(%d) = %d, want %d", size, from, got, want)
			}
			if got := b.any(begin, end); got != slices.Contains(model[begin:end], true) {
				t.Fatalf("size %d: any(%d, %d) = %v", size, begin, end, got)
			}
			n := int64(0)
			for i, member := range model {
				if member {
					n++
				}
				if b.has(int64(i)) != member {
					t.Fatalf("size %d: has(%d) = %v", size, i, !member)
				}
			}
			if b.n != n {
				t.Fatalf("size %d: %d members, want %d", size, b.n, n)
			}
		}
	}
}
