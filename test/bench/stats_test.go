package main

import (
	"math"
	"testing"
)

func TestSpread(t *testing.T) {
	tests := []struct {
		name   string
		values []float64
		want   spread
	}{
		{"none", nil, spread{}},
		{"one", []float64{3}, spread{3, 3, 3, 1}},
		{"odd", []float64{9, 1, 4}, spread{4, 1, 9, 3}},
		{"even", []float64{8, 1, 2, 4}, spread{3, 1, 8, 4}},
		{"one far off", []float64{1, 1, 1, 1, 100}, spread{1, 1, 100, 5}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := spreadOf(tt.values); got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}

func TestPercentile(t *testing.T) {
	hundred := make([]int64, 100)
	for i := range hundred {
		hundred[i] = int64(i + 1)
	}
	tests := []struct {
		name   string
		values []int64
		p      float64
		want   int64
	}{
		{"of none", nil, 50, 0},
		{"of one", []int64{7}, 99, 7},
		{"median", hundred, 50, 50},
		{"99th", hundred, 99, 99},
		{"above all but one", hundred, 99.5, 100},
		{"lowest", hundred, 0, 1},
		{"of few, the highest", []int64{1, 2, 3}, 99, 3},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := percentile(tt.values, tt.p); got != tt.want {
				t.Errorf("got %d, want %d", got, tt.want)
			}
		})
	}
}

func TestLatencies(t *testing.T) {
	mean, p50, p99 := latencies([]int64{4000, 1000, 2000, 9000})
	if mean != 4 || p50 != 2 || p99 != 9 {
		t.Errorf("got mean %v, median %v, 99th percentile %v; want 4, 2 and 9 µs", mean, p50, p99)
	}
}

// ran makes a sample that moved so many MiB in a second.
func ran(name, server string, round int, rate float64) sample {
	return sample{Case: name, Server: server, Round: round, Bytes: int64(rate) << 20, Seconds: 1}
}

// TestRatiosAreWithinARound: the medians' ratio would be 1, since both were slow
// once.
func TestRatiosAreWithinARound(t *testing.T) {
	r := &results{samples: []sample{
		ran("c", ours, 1, 100), ran("c", nbdkit, 1, 50),
		ran("c", nbdkit, 2, 100), ran("c", ours, 2, 200),
		ran("c", ours, 3, 100), ran("c", nbdkit, 3, 100),
		ran("c", ours, 4, 100), // of a round in which the peer failed
		{Case: "c", Server: nbdkit, Round: 4, Failed: "no", Bytes: 1 << 20, Seconds: 1},
		ran("other", nbdkit, 1, 1),
	}}
	if got, want := r.ratio("c", ours, nbdkit, rate), (spread{2, 1, 2, 3}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got := r.of("c", nbdkit, rate); got != (spread{100, 50, 100, 3}) {
		t.Errorf("median: got %+v", got)
	}
	if got := r.ratio("c", ours, qemu, rate); got.n != 0 {
		t.Errorf("against nobody: got %+v", got)
	}
	if n := len(r.failures()); n != 1 {
		t.Errorf("got %d failures, want 1", n)
	}
}

func TestCPUPerGiB(t *testing.T) {
	if got := cpuPerGiB(sample{Bytes: 1 << 29, CPU: 0.25}); got != 0.5 {
		t.Errorf("got %v s/GiB, want 0.5", got)
	}
	if got := cpuPerGiB(sample{CPU: 1}); got != 0 {
		t.Errorf("of no bytes: got %v, want 0: not measured", got)
	}
}

// TestTargetsTakeTheWorst: a target is met only if it is in each of its cases.
func TestTargetsTakeTheWorst(t *testing.T) {
	r := &results{samples: []sample{
		ran("bulk/file/clear/1x16/256k", ours, 1, 300), ran("bulk/file/clear/1x16/256k", nbdkit, 1, 200),
		ran("bulk/loop/clear/4x64/2m", ours, 1, 110), ran("bulk/loop/clear/4x64/2m", nbdkit, 1, 100),
		ran("bulk/file/tls/1x16/2m", ours, 1, 1), ran("bulk/file/tls/1x16/2m", nbdkit, 1, 100),
		{Case: "random/file/4k/d1", Server: ours, Round: 1, Mean: 30}, {Case: "random/file/4k/d1", Server: nbdkit, Round: 1, Mean: 50},
		{Case: "random/loop/4k/d1", Server: ours, Round: 1, Mean: 35}, {Case: "random/loop/4k/d1", Server: nbdkit, Round: 1, Mean: 50},
	}}
	tests := []struct {
		name, vs  string
		met, of   int
		worst     float64
		worstCase string
	}{
		{"bulk clear", nbdkit, 1, 2, 1.1, "bulk/loop/clear/4x64/2m"},
		{"bulk clear", qemu, 0, 0, 0, ""},
		{"bulk TLS, 1 conn", nbdkit, 0, 1, 0.01, "bulk/file/tls/1x16/2m"},
		{"4 KiB, depth 1, latency", nbdkit, 2, 2, 0.7, "random/loop/4k/d1"},
	}
	for _, tt := range tests {
		t.Run(tt.name+" "+tt.vs, func(t *testing.T) {
			for _, target := range targets() {
				if target.name != tt.name || target.vs != tt.vs {
					continue
				}
				v := target.judge(r)
				if v.met != tt.met || v.of != tt.of || v.worstCase != tt.worstCase || math.Abs(v.worst.median-tt.worst) > 1e-9 {
					t.Errorf("got %+v, want %+v", v, tt)
				}
				return
			}
			t.Error("no such target")
		})
	}
}

// TestTargetsHaveCases: a pattern that matches no case would never be missed.
func TestTargetsHaveCases(t *testing.T) {
	for _, target := range targets() {
		if len(pick(allCases(), target.cases)) == 0 {
			t.Errorf("%s: no case matches %q", target.name, target.cases)
		}
	}
}

// TestSlowShare: the limit is the lower of what the device gives and what the
// server carries.
func TestSlowShare(t *testing.T) {
	reads := func(name, server string, n int64) sample {
		return sample{Case: name, Server: server, Round: 1, Reads: n, Seconds: 1}
	}
	r := &results{samples: []sample{
		reads("slow/4k/2ms", ours, 7000), reads("slow/4k/2ms", direct, 7500), reads("slow/4k/0ms", ours, 90000),
		reads("slow/2m/2ms", ours, 600), reads("slow/2m/2ms", direct, 3000), reads("slow/2m/0ms", ours, 625),
	}}
	for name, want := range map[string]float64{"slow/4k/2ms": 7000. / 7500, "slow/2m/2ms": 0.96} {
		if got := slowShare(r, name, ours).median; math.Abs(got-want) > 1e-9 {
			t.Errorf("%s: got %v, want %v", name, got, want)
		}
	}
	if got := slowShare(r, "slow/4k/2ms", nbdkit); got.n != 0 {
		t.Errorf("of a server that did not run: got %+v", got)
	}
}
