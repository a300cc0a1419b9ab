package main

import (
	"fmt"
	"slices"
)

// sample is the result of one run of a client against one server. A field that was not
// measured is zero.
type sample struct {
	Case, Server string
	Round        int // from 1; the warm-up is not kept

	Bytes, Reads int64
	Seconds      float64 // around the client
	CPU          float64 // seconds of the server, user and system
	Mean, P99    float64 // latency of a read in µs
	Median       float64 // latency of a write in µs
	PeakRSS      int64   // of the server during the run
	RSS          int64   // with idle connections
	RSSFresh     int64   // before any connection

	// Bytes that the client received, that were read from the device, and that had to be.
	Wire, Device, Needed int64

	Resident *float64 // share of the image that is in the page cache afterwards
	Failed   string
}

// of completes a sample with its origin and its error.
func (s sample) of(c testCase, server string, round int, err error) sample {
	s.Case, s.Server, s.Round = c.name, server, round
	if err != nil {
		s.Failed = err.Error()
	}
	return s
}

// summary is the sample in the progress output.
func (s sample) summary() string {
	switch {
	case s.Failed != "":
		return "failed: " + s.Failed
	case s.Resident != nil:
		return fmt.Sprintf("%.0f %% cached", residentShare(s))
	case s.RSS != 0:
		return fmt.Sprintf("%.0f MiB", rssMiB(s))
	}
	return fmt.Sprintf("%.0f MiB/s", rate(s))
}

// metric is one number of a sample, 0 if it was not measured.
type metric func(sample) float64

func rate(s sample) float64        { return per(float64(s.Bytes)/(1<<20), s.Seconds) }
func readRate(s sample) float64    { return per(float64(s.Reads), s.Seconds) }
func cpuPerGiB(s sample) float64   { return per(s.CPU, float64(s.Bytes)/(1<<30)) }
func meanLatency(s sample) float64 { return s.Mean }
func median(s sample) float64      { return s.Median }
func p99Latency(s sample) float64  { return s.P99 }
func peakMiB(s sample) float64     { return float64(s.PeakRSS) / (1 << 20) }
func rssMiB(s sample) float64      { return float64(s.RSS) / (1 << 20) }
func freshMiB(s sample) float64    { return float64(s.RSSFresh) / (1 << 20) }
func wireShare(s sample) float64   { return per(float64(s.Wire), float64(s.Needed)) }
func deviceShare(s sample) float64 { return per(float64(s.Device), float64(s.Needed)) }
func seconds(s sample) float64     { return s.Seconds }
func attachKiB(s sample) float64   { return float64(s.RSS-s.RSSFresh) / (1 << 10) / attachments }
func connKiB(s sample) float64     { return float64(s.RSS-s.RSSFresh) / (1 << 10) / idleConns }

func residentShare(s sample) float64 {
	if s.Resident == nil {
		return 0
	}
	return 100 * *s.Resident
}

// per divides, and returns 0 for a divisor of 0.
func per(a, b float64) float64 {
	if b == 0 {
		return 0
	}
	return a / b
}

// results are the samples of all rounds.
type results []sample

// failures returns the failed runs. The other methods leave them out.
func (r results) failures() []sample {
	return slices.DeleteFunc(slices.Clone(r), func(s sample) bool { return s.Failed == "" })
}

// names returns the distinct values of a field over the samples of a case, "" being all
// cases, in the order in which they ran.
func (r results) names(of string, field func(sample) string) []string {
	var names []string
	for _, s := range r {
		if name := field(s); s.Failed == "" && (of == "" || s.Case == of) && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

// rounds returns the samples of one server in one case by round.
func (r results) rounds(name, server string) map[int]sample {
	found := map[int]sample{}
	for _, s := range r {
		if s.Case == name && s.Server == server && s.Failed == "" {
			found[s.Round] = s
		}
	}
	return found
}

// over returns a metric over the rounds.
func (r results) over(name, server string, m metric) spread {
	var values []float64
	for _, s := range r.rounds(name, server) {
		values = append(values, m(s))
	}
	return spreadOf(values)
}

// ratio returns a/b over the rounds. Both values are of the same round: a disturbance that
// lasts longer than a round disturbs both.
func (r results) ratio(name, a, b string, m metric) spread {
	var values []float64
	others := r.rounds(name, b)
	for round, s := range r.rounds(name, a) {
		if t, ok := others[round]; ok && m(t) > 0 && m(s) > 0 {
			values = append(values, m(s)/m(t))
		}
	}
	return spreadOf(values)
}

// spread is the median and the extremes of n values. With none all fields are 0.
type spread struct {
	median, min, max float64
	n                int
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
