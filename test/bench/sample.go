package main

import (
	"slices"
)

// sample is what one run of a client against one server gave. What is zero was
// not measured.
type sample struct {
	Case    string  `json:"case"`
	Server  string  `json:"server"`
	Round   int     `json:"round"` // from 1 on; the warm-up is round 0 and not kept
	Bytes   int64   `json:"bytes,omitempty"`
	Reads   int64   `json:"reads,omitempty"`
	Seconds float64 `json:"seconds,omitempty"`            // by the clock, around the client
	CPU     float64 `json:"server_cpu_seconds,omitempty"` // user and system

	// How long one read took, in microseconds.
	Mean float64 `json:"mean_us,omitempty"`
	P50  float64 `json:"p50_us,omitempty"`
	P99  float64 `json:"p99_us,omitempty"`

	PeakRSS  int64 `json:"peak_rss,omitempty"` // of the server during the run
	RSS      int64 `json:"rss,omitempty"`
	RSSFresh int64 `json:"rss_fresh,omitempty"` // before any connection

	Beside float64 `json:"beside_mib_per_second,omitempty"` // what the bulk reader beside got

	Resident *float64 `json:"resident,omitempty"` // share of the warm file that is still in the page cache

	Failed string `json:"failed,omitempty"`
}

// metric is one number of a sample, 0 if it was not measured.
type metric func(sample) float64

// rate is what all comparisons of throughput and IOPS use: the cases that are
// compared with each other read the same blocks.
func rate(s sample) float64 {
	if s.Seconds == 0 {
		return 0
	}
	return float64(s.Bytes) / (1 << 20) / s.Seconds
}

func readRate(s sample) float64 {
	if s.Seconds == 0 {
		return 0
	}
	return float64(s.Reads) / s.Seconds
}

func cpuPerGiB(s sample) float64 {
	if s.Bytes == 0 {
		return 0
	}
	return s.CPU / (float64(s.Bytes) / (1 << 30))
}

func meanLatency(s sample) float64 { return s.Mean }
func p50Latency(s sample) float64  { return s.P50 }
func p99Latency(s sample) float64  { return s.P99 }
func peakMiB(s sample) float64     { return float64(s.PeakRSS) / (1 << 20) }
func rssMiB(s sample) float64      { return float64(s.RSS) / (1 << 20) }
func freshMiB(s sample) float64    { return float64(s.RSSFresh) / (1 << 20) }

func besideRate(s sample) float64 { return s.Beside }

// results are the samples of all rounds.
type results struct{ samples []sample }

func (r *results) add(s sample) { r.samples = append(r.samples, s) }

// failures are the runs that failed; no other method sees them.
func (r *results) failures() []sample {
	var failed []sample
	for _, s := range r.samples {
		if s.Failed != "" {
			failed = append(failed, s)
		}
	}
	return failed
}

// cases names the cases with at least one sample, in the order they ran.
func (r *results) cases() []string {
	var names []string
	for _, s := range r.samples {
		if s.Failed == "" && !slices.Contains(names, s.Case) {
			names = append(names, s.Case)
		}
	}
	return names
}

// rounds are the samples of one server in one case, by round.
func (r *results) rounds(name, server string) map[int]sample {
	found := map[int]sample{}
	for _, s := range r.samples {
		if s.Case == name && s.Server == server && s.Failed == "" {
			found[s.Round] = s
		}
	}
	return found
}

// of sums a metric up over the rounds.
func (r *results) of(name, server string, m metric) spread {
	var values []float64
	for _, s := range r.rounds(name, server) {
		values = append(values, m(s))
	}
	return spreadOf(values)
}

// ratio compares a with b within each round and sums that up: what disturbs the
// machine for longer than a round disturbs both.
func (r *results) ratio(name, a, b string, m metric) spread {
	var values []float64
	theirs := r.rounds(name, b)
	for round, s := range r.rounds(name, a) {
		if t, ok := theirs[round]; ok && m(t) > 0 && m(s) > 0 {
			values = append(values, m(s)/m(t))
		}
	}
	return spreadOf(values)
}

// worst is the largest value of a metric over the rounds of all cases whose
// name the function accepts.
func (r *results) worst(accept func(string) bool, server string, m metric) float64 {
	var most float64
	for _, s := range r.samples {
		if s.Server == server && s.Failed == "" && accept(s.Case) {
			most = max(most, m(s))
		}
	}
	return most
}
