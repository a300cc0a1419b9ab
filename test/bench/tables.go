package main

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// everyServer is the order of servers in tables.
var everyServer = []string{ours, nbdkit, qemu, splice, iperf, direct}

// allTables are those with something in them.
func allTables(r *results, o options) []table {
	tables := []table{
		targetTable(r, o.run.String() == ""),
		rateTable(r, "Whole disks, image in a file", "nbdcopy to null:, connections x requests in flight / size of a request.", `^bulk/file/`),
		rateTable(r, "Whole disks, image on a loop device", "The same on a block device.", `^bulk/loop/`),
		rateTable(r, "Nine tenths zeroes, TLS",
			fmt.Sprintf("Zeroes that were written: the file has no holes. Pieces of %d KiB, as chance has it.", zeroPiece/kib), `^zeros/`),
		randomTable(r, "Reads at random", "fio's nbd engine, one connection, size of a block / reads in flight. Latencies are fio's, in microseconds: "+
			"the mean from submission to completion, and the 99th percentile of the completion.", `^random/`),
		randomTable(r, "Reads at random, nothing in the page cache", "The same on a loop device whose blocks are not in the page cache, "+
			"though those of the file below it are in memory.", `^cold/loop/4k`),
		rateTable(r, "Whole disks, nothing in the page cache", "nbdcopy from the same device.", `^cold/loop/1x`),
		slowTable(r),
		rateTable(r, "At a distance", "Through a relay that holds every byte back by 10 or 50 ms, each way, and does not limit the rate. "+
			"It ends both connections, so TCP's own slowness at a distance is not in it.", `^link/`),
		fairTable(r),
		crowdTable(r),
		memoryTable(r),
		cacheTable(r, o),
		floorTable(r),
	}
	return slices.DeleteFunc(tables, func(t table) bool { return len(t.rows) == 0 })
}

// servers are those with samples in a case.
func (r *results) servers(name string) []string {
	return slices.DeleteFunc(slices.Clone(everyServer), func(s string) bool { return len(r.rounds(name, s)) == 0 })
}

// ratioCell compares ours with a peer; our own row has none.
func ratioCell(r *results, name, server string, m metric) string {
	if server == ours {
		return ""
	}
	return ratioText(r.ratio(name, ours, server, m))
}

// medianCell is the same without the ends.
func medianCell(r *results, name, server string, m metric) string {
	if server == ours {
		return ""
	}
	return number(r.ratio(name, ours, server, m).median)
}

// rateTable compares throughput.
func rateTable(r *results, title, note, cases string) table {
	t := table{
		title: title, note: note,
		head: []string{"case", "server", "MiB/s", "ours is", "CPU s/GiB", "ours is", "peak MiB"},
		left: []int{0, 1},
	}
	match := regexp.MustCompile(cases)
	for _, name := range r.cases() {
		if !match.MatchString(name) {
			continue
		}
		for i, s := range r.servers(name) {
			t.rows = append(t.rows, []string{
				first(i, name), s, number(r.of(name, s, rate).median), ratioCell(r, name, s, rate),
				number(r.of(name, s, cpuPerGiB).median), medianCell(r, name, s, cpuPerGiB), number(r.of(name, s, peakMiB).max),
			})
		}
	}
	return t
}

// first is the name of a case on the first of its rows.
func first(i int, name string) string {
	if i > 0 {
		return ""
	}
	return name
}

// randomTable compares rates and latencies of fio.
func randomTable(r *results, title, note, cases string) table {
	t := table{
		title: title, note: note,
		head: []string{"case", "server", "reads/s", "ours is", "mean", "ours is", "p99", "CPU s/GiB", "ours is"},
		left: []int{0, 1},
	}
	match := regexp.MustCompile(cases)
	for _, name := range r.cases() {
		if !match.MatchString(name) {
			continue
		}
		for i, s := range r.servers(name) {
			t.rows = append(t.rows, []string{
				first(i, name), s, number(r.of(name, s, readRate).median), ratioCell(r, name, s, readRate),
				number(r.of(name, s, meanLatency).median), medianCell(r, name, s, meanLatency), number(r.of(name, s, p99Latency).median),
				number(r.of(name, s, cpuPerGiB).median), medianCell(r, name, s, cpuPerGiB),
			})
		}
	}
	return t
}

func slowTable(r *results) table {
	t := table{
		title: "A slow device",
		note: fmt.Sprintf("fio, %d reads in flight, on a device that waits %v for every read: nbdkit's delay filter, and for us a device "+
			"of the benchmark that waits in a system call. \"direct\" is %d threads reading that device without a server. The limit is direct, or, "+
			"where that is more than loopback carries, what the same server carries with no wait (0 ms).", slowDepth, slowDelay, slowDepth),
		head: []string{"case", "server", "reads/s", "of 16 per 2 ms", "at 0 ms", "of the limit"},
		left: []int{0, 1},
	}
	theory := slowDepth / slowDelay.Seconds()
	for _, size := range []int64{4 * kib, 2 * mib} {
		name := slowCaseName(size, slowDevice)
		for i, s := range r.servers(name) {
			got := r.of(name, s, readRate).median
			t.rows = append(t.rows, []string{
				first(i, name), s, number(got), fmt.Sprintf("%.3f", got/theory),
				number(r.of(slowCaseName(size, fastDevice), s, readRate).median), ratioText(slowShare(r, name, s)),
			})
		}
	}
	return t
}

func fairTable(r *results) table {
	t := table{
		title: "Fairness",
		note: fmt.Sprintf("Latency of 4 KiB reads, one at a time on one connection, in microseconds: alone, and while another process "+
			"reads 2 MiB at a time with %d requests in flight on another connection, and what that one gets.", bulkDepth),
		head: []string{"server", "median", "p99", "median beside", "p99 beside", "bulk MiB/s"},
		left: []int{0},
	}
	cases := fairCases()
	alone, beside := cases[0].name, cases[1].name
	for _, s := range everyServer {
		if len(r.rounds(alone, s))+len(r.rounds(beside, s)) == 0 {
			continue
		}
		t.rows = append(t.rows, []string{
			s, number(r.of(alone, s, p50Latency).median), number(r.of(alone, s, p99Latency).median),
			number(r.of(beside, s, p50Latency).median), number(r.of(beside, s, p99Latency).median), number(r.of(beside, s, besideRate).median),
		})
	}
	return t
}

func memoryTable(r *results) table {
	t := table{
		title: "Memory",
		note: fmt.Sprintf("Resident memory of the server in MiB: fresh, after a single connection; with %d idle ones that have negotiated and read "+
			"a block each (qemu-nbd is told to accept so many), and the peak while whole disks are copied. Pipes and socket buffers are the kernel's and not in it.", idleConns),
		head: []string{"server", "fresh", "idle", "KiB per connection", "peak clear", "peak TLS"},
		left: []int{0},
	}
	idle, clearBulk, tlsBulk := idleCase().name, regexp.MustCompile(`^bulk/\w+/clear/`), regexp.MustCompile(`^bulk/\w+/tls/`)
	for _, s := range everyServer[:3] {
		fresh, held := r.of(idle, s, freshMiB), r.of(idle, s, rssMiB)
		row := []string{
			s, number(fresh.min), number(held.median), number((held.median - fresh.min) * 1024 / idleConns),
			number(r.worst(clearBulk.MatchString, s, peakMiB)), number(r.worst(tlsBulk.MatchString, s, peakMiB)),
		}
		if strings.Join(row[1:], "") != "-----" {
			t.rows = append(t.rows, row)
		}
	}
	return t
}

func cacheTable(r *results, o options) table {
	limit, disk, warm := cacheSizes(o)
	t := table{
		title: "The page cache",
		note: fmt.Sprintf("In a memory cgroup of %d MiB a file of %d MiB is read until it is warm; then a server in the same cgroup exports an image of "+
			"%d MiB from a disk. Shown is how much of the warm file is still in the page cache.", limit/mib, warm/mib, disk/mib),
		head: []string{"server", "still there", "smallest", "largest", "MiB/s"},
		left: []int{0},
	}
	name := cacheCase().name
	for _, s := range r.servers(name) {
		left := r.of(name, s, func(s sample) float64 { return 100 * *s.Resident })
		t.rows = append(t.rows, []string{
			s, fmt.Sprintf("%.0f %%", left.median), fmt.Sprintf("%.0f %%", left.min), fmt.Sprintf("%.0f %%", left.max),
			number(r.of(name, s, rate).median),
		})
	}
	return t
}

// floorTable also shows how near ours comes with large requests.
func floorTable(r *results) table {
	t := table{
		title: "Floors",
		note: "The same bytes over loopback without a protocol, on 1 and 4 connections: a bare loop of splice(2) from the file, thrown away " +
			"by a reader; and iperf3, whose sender has nothing to read. \"ours at\" is nbdcopy with 2 MiB requests from the file, in the clear, on as many connections.",
		head: []string{"case", "sender", "MiB/s", "CPU s/GiB", "ours at", "ours is"},
		left: []int{0, 1},
	}
	nearest := map[string]string{"floor/1": "bulk/file/clear/1x16/2m", "floor/4": "bulk/file/clear/4x64/2m"}
	for _, name := range r.cases() {
		bulk, ok := nearest[name]
		if !ok {
			continue
		}
		for i, s := range r.servers(name) {
			got, reached := r.of(name, s, rate).median, r.of(bulk, ours, rate).median
			t.rows = append(t.rows, []string{
				first(i, name), s, number(got), number(r.of(name, s, cpuPerGiB).median), number(reached), number(reached / got),
			})
		}
	}
	return t
}
