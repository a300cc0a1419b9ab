package main

import (
	"math"
	"slices"
)

// spread is the middle and the ends of some values.
type spread struct {
	median, min, max float64
	n                int // how many; with none the others mean nothing
}

func spreadOf(values []float64) spread {
	if len(values) == 0 {
		return spread{}
	}
	v := slices.Sorted(slices.Values(values))
	middle := v[len(v)/2]
	if len(v)%2 == 0 {
		middle = (v[len(v)/2-1] + middle) / 2
	}
	return spread{middle, v[0], v[len(v)-1], len(v)}
}

// percentile is the smallest value that p per cent of them do not exceed
// (nearest rank). The values must be sorted; of none it is 0.
func percentile[T int64 | float64](sorted []T, p float64) T {
	if len(sorted) == 0 {
		return 0
	}
	rank := int(math.Ceil(p / 100 * float64(len(sorted))))
	return sorted[min(max(rank, 1), len(sorted))-1]
}

// latencies sums up how long single reads took, in nanoseconds, as
// microseconds. It sorts its argument.
func latencies(ns []int64) (mean, p50, p99 float64) {
	if len(ns) == 0 {
		return 0, 0, 0
	}
	slices.Sort(ns)
	var sum float64
	for _, n := range ns {
		sum += float64(n)
	}
	return sum / float64(len(ns)) / 1e3, float64(percentile(ns, 50)) / 1e3, float64(percentile(ns, 99)) / 1e3
}
