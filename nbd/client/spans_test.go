package client

import (
	"errors"
	"math/rand/v2"
	"testing"
)

// Parts in any order cover the whole once all have been added, and a byte that is added
// twice is an error.
func TestSpans(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 0))
		n := 1 + r.Uint64N(5000)
		var pieces []span
		for at := uint64(0); at < n; {
			end := min(n, at+1+r.Uint64N(1+n/20))
			pieces = append(pieces, span{at, end})
			at = end
		}
		r.Shuffle(len(pieces), func(i, j int) { pieces[i], pieces[j] = pieces[j], pieces[i] })
		var s spans
		total := uint64(0)
		for i, p := range pieces {
			if s.covers(n) || s.total() != total {
				t.Fatalf("seed %d: %d of %d bytes after %d pieces, covered %v", seed, s.total(), n, i, s.covers(n))
			}
			if err := s.add(p.begin, p.end); err != nil {
				t.Fatalf("seed %d: piece %v: %v", seed, p, err)
			}
			total += p.end - p.begin
			seen := pieces[r.IntN(i+1)]
			at := seen.begin + r.Uint64N(seen.end-seen.begin)
			begin := at - min(at, r.Uint64N(10))
			if err := s.add(begin, at+1+r.Uint64N(10)); !errors.Is(err, errOverlap) {
				t.Fatalf("seed %d: around byte %d: got error %v, want an overlap", seed, at, err)
			}
		}
		if !s.covers(n) {
			t.Errorf("seed %d: %v do not cover %d bytes", seed, s, n)
		}
	}
}

func TestSpansAreBounded(t *testing.T) {
	var s spans
	for i := range uint64(maxSpans) {
		if err := s.add(2*i, 2*i+1); err != nil {
			t.Fatalf("piece %d: %v", i, err)
		}
	}
	if err := s.add(2*maxSpans, 2*maxSpans+1); !errors.Is(err, errScattered) {
		t.Errorf("one more: got error %v, want errScattered", err)
	}
	if err := s.add(1, 2); err != nil || len(s) != maxSpans-1 {
		t.Errorf("filling a gap: got error %v and %d spans", err, len(s))
	}
}
