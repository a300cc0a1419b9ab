package main

import (
	"fmt"
	"regexp"
	"strings"
)

// target is a number that the project wants to reach. It is held against each
// case on its own, and the worst decides.
type target struct {
	name   string
	vs     string // a peer, or limit
	cases  *regexp.Regexp
	value  func(r *results, name string) spread // how ours compares, in a case
	want   float64
	atMost bool // rather less than more
}

// limit is what a slow device is compared with.
const limit = "limit"

// against compares with a peer within each round.
func against(peer string, m metric) func(*results, string) spread {
	return func(r *results, name string) spread { return r.ratio(name, ours, peer, m) }
}

// targets are those of the project, as ratios ours/peer in one run on 2 cores.
func targets() []target {
	more := func(name, vs, cases string, want float64) target {
		return target{name: name, vs: vs, cases: regexp.MustCompile(cases), value: against(vs, rate), want: want}
	}
	less := func(name, vs, cases string, m metric, want float64) target {
		return target{name: name, vs: vs, cases: regexp.MustCompile(cases), value: against(vs, m), want: want, atMost: true}
	}
	const (
		clearBulk = `^bulk/\w+/clear/`
		fourTLS   = `^bulk/\w+/tls/4x`
		oneTLS    = `^bulk/\w+/tls/1x`
		depth1    = `^random/\w+/4k/d1$`
		depth64   = `^random/\w+/4k/d64$`
		zeros     = `^zeros/`
		slow      = `^slow/.*/2ms$`
		nearLink  = `^link/10ms/`
		all       = `^(bulk|random|zeros|link)/|` + slow
	)
	return []target{
		more("bulk clear", nbdkit, clearBulk, 1.25),
		more("stretch: bulk clear", nbdkit, clearBulk, 1.5),
		less("bulk clear CPU", nbdkit, clearBulk, cpuPerGiB, 0.65),
		less("stretch: bulk clear CPU", nbdkit, clearBulk, cpuPerGiB, 0.5),
		more("bulk clear", qemu, clearBulk, 1.4),
		more("bulk TLS, 4 conns", nbdkit, fourTLS, 1.15),
		less("bulk TLS, 4 conns, CPU", nbdkit, fourTLS, cpuPerGiB, 0.95),
		more("bulk TLS, 4 conns", qemu, fourTLS, 1.3),
		more("bulk TLS, 1 conn", nbdkit, oneTLS, 1),
		more("stretch: TLS, 1 conn", nbdkit, oneTLS, 1.2),
		more("bulk TLS, 1 conn", qemu, oneTLS, 1.05),
		less("4 KiB, depth 1, latency", nbdkit, depth1, meanLatency, 0.8),
		less("4 KiB, depth 1, latency", qemu, depth1, meanLatency, 0.5),
		more("4 KiB, depth 64, IOPS", nbdkit, depth64, 1.2),
		more("4 KiB, depth 64, IOPS", qemu, depth64, 2.5),
		{
			name: "2 ms device, depth 16", vs: limit, cases: regexp.MustCompile(slow), want: 0.95,
			value: func(r *results, name string) spread { return slowShare(r, name, ours) },
		},
		more("90 % zeros, TLS", nbdkit, zeros, 3),
		more("90 % zeros, TLS", qemu, zeros, 1.5),
		more("10 ms link, 1 conn", nbdkit, nearLink, 1),
		more("10 ms link, 1 conn", qemu, nearLink, 1),
		more("every case", nbdkit, all, 0.9),
	}
}

// verdict is what came of a target.
type verdict struct {
	met, of   int    // cases
	worst     spread // of all of them
	worstCase string
}

func (t target) judge(r *results) verdict {
	var v verdict
	for _, name := range r.cases() {
		if !t.cases.MatchString(name) {
			continue
		}
		got := t.value(r, name)
		if got.n == 0 {
			continue
		}
		if v.of++; t.reached(got.median) {
			v.met++
		}
		if v.worstCase == "" || t.atMost == (got.median > v.worst.median) && got.median != v.worst.median {
			v.worst, v.worstCase = got, name
		}
	}
	return v
}

func (t target) reached(value float64) bool {
	if t.atMost {
		return value <= t.want
	}
	return value >= t.want
}

// targetTable holds every target against what was measured. With all false
// targets of which nothing was measured are left out.
func targetTable(r *results, all bool) table {
	tab := table{
		title: "Targets",
		note: "Ratios ours/peer; wanted in every case that a target is about (met: in how many of them), " +
			"shown is the worst: the median of the rounds, and the smallest and largest. \"limit\" is explained at the slow device.",
		head: []string{"target", "against", "wanted", "measured", "met", "worst case"},
		left: []int{0, 1, 5},
	}
	for _, t := range targets() {
		v := t.judge(r)
		if v.of == 0 && !all {
			continue
		}
		sign := "≥"
		if t.atMost {
			sign = "≤"
		}
		row := []string{t.name, t.vs, fmt.Sprintf("%s %.4g", sign, t.want), "not measured", "-", "-"}
		if v.of > 0 {
			word := "yes"
			if v.met < v.of {
				word = "NO"
			}
			row[3], row[4], row[5] = ratioText(v.worst), fmt.Sprintf("%s %d/%d", word, v.met, v.of), v.worstCase
		}
		tab.rows = append(tab.rows, row)
	}
	return tab
}

// slowShare is the rate of a server on the slow device as a share of what could
// be: what as many overlapping reads get from the device directly, or, where
// that is more, what the server itself carries when the device is not slow.
func slowShare(r *results, name, server string) spread {
	bound := slowBound(r, name, server)
	if bound == 0 {
		return spread{}
	}
	return r.of(name, server, func(s sample) float64 { return readRate(s) / bound })
}

func slowBound(r *results, name, server string) float64 {
	device := r.of(name, direct, readRate).median
	carried := r.of(strings.Replace(name, "/"+slowDelay.String(), "/0ms", 1), server, readRate).median
	if device == 0 || carried == 0 {
		return 0
	}
	return min(device, carried)
}
