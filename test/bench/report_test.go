package main

import (
	"regexp"
	"strings"
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
		{"outlier", []float64{1, 1, 1, 1, 100}, spread{1, 1, 100, 5}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := spreadOf(tt.values); got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}

// moved returns a sample of so many MiB in a second.
func moved(server string, round int, mib float64) sample {
	return sample{Case: "c", Server: server, Round: round, Bytes: int64(mib) << 20, Seconds: 1}
}

// TestRatiosAreWithinARound: the ratio of the medians would be 1, because both were slow
// once.
func TestRatiosAreWithinARound(t *testing.T) {
	failed := moved(nbdkit, 4, 1)
	failed.Failed = "no"
	r := results{
		moved(ours, 1, 100), moved(nbdkit, 1, 50), moved(nbdkit, 2, 100), moved(ours, 2, 200),
		moved(ours, 3, 100), moved(nbdkit, 3, 100), moved(ours, 4, 100), failed,
	}
	if got, want := r.ratio("c", ours, nbdkit, rate), (spread{2, 1, 2, 3}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got := r.over("c", nbdkit, rate); got != (spread{100, 50, 100, 3}) {
		t.Errorf("median: got %+v", got)
	}
	if got := r.ratio("c", ours, qemu, rate); got.n != 0 {
		t.Errorf("a server without samples: got %+v", got)
	}
	if n := len(r.failures()); n != 1 {
		t.Errorf("got %d failures, want 1", n)
	}
	if got := cpuPerGiB(sample{Bytes: 1 << 29, CPU: 0.25}); got != 0.5 {
		t.Errorf("got %v s/GiB, want 0.5", got)
	}
	if got := cpuPerGiB(sample{CPU: 1}); got != 0 {
		t.Errorf("CPU time without bytes: got %v, want 0, which is not measured", got)
	}
}

// TestTables: every case is in exactly one table, and all rows have as many cells as the
// head.
func TestTables(t *testing.T) {
	left := 0.5
	b := &bench{builds: []build{{name: ours}}}
	for _, c := range allCases() {
		n := 0
		for _, table := range tables {
			if regexp.MustCompile(table.match).MatchString(c.name) {
				n++
			}
		}
		if n != 1 {
			t.Errorf("%s is in %d tables, want 1", c.name, n)
		}
		for _, server := range []string{nbdkit, ours} {
			for round := range 2 {
				b.results = append(b.results, sample{
					Case: c.name, Server: server, Round: round, Bytes: 1 << 30, Reads: 1000, Seconds: 1, CPU: 1,
					Mean: 12345, P99: 123456, PeakRSS: 1 << 30, RSS: 2 << 20, RSSFresh: 1 << 20, Resident: &left,
				})
			}
		}
	}
	text := b.markdown(t.Context())
	if got := strings.Count(text, "\n## "); got != len(tables) {
		t.Errorf("got %d tables, want %d", got, len(tables))
	}
	cells := 0
	for line := range strings.Lines(text) {
		switch n := strings.Count(line, "|"); {
		case strings.HasPrefix(line, "| case |"):
			cells = n
		case n > 0 && n != cells:
			t.Errorf("%d cells, want %d: %s", n, cells, line)
		}
	}
	if !strings.Contains(text, "| cache | ours | 50.0 | 1024 | |\n|  | nbdkit | 50.0 | 1024 | 1.00 (1.00-1.00) |\n") {
		t.Errorf("no row of the page cache, or ours is not the first:\n%s", text)
	}
}

func TestOptions(t *testing.T) {
	tests := []struct {
		name string
		args []string
		want string
	}{
		{"expression", []string{"-run", "("}, "-run"},
		{"no case", []string{"-run", "^nothing$"}, "no case matches"},
		{"rounds", []string{"-rounds", "0"}, "at least one round"},
		{"size", []string{"-size", "1"}, "16 MiB"},
		{"argument", []string{"bulk"}, "not flags"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out strings.Builder
			if err := run(t.Context(), tt.args, &out, &out); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got error %v, want one with %q", err, tt.want)
			}
		})
	}
	var out strings.Builder
	if err := run(t.Context(), []string{"-list", "-run", "^zeros/.*/2m"}, &out, &out); err != nil {
		t.Fatal(err)
	}
	if got, want := out.String(), "zeros/tls/1x16/2m\nzeros/tls/4x64/2m\n"; got != want {
		t.Errorf("-list: got %q, want %q", got, want)
	}
}
