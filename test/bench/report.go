package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// column is a column of a table: medians of a metric, and of its ratio to the first server
// if that is wanted.
type column struct {
	head  string
	value metric
	ratio bool
}

var (
	rateColumn = column{"MiB/s", rate, true}
	cpuColumn  = column{"CPU s/GiB", cpuPerGiB, true}
	fioColumns = []column{
		{"reads/s", readRate, true}, {"mean µs", meanLatency, true}, {"p99 µs", p99Latency, false}, cpuColumn,
	}
	// Of the bytes in blocks with data, or in changed blocks.
	wasteColumns = []column{{"received", wireShare, false}, {"read", deviceShare, false}, {"seconds", seconds, true}, {"peak MiB", peakMiB, false}}
	copyColumns  = []column{rateColumn, cpuColumn, {"peak MiB", peakMiB, false}}
)

// tables are those of the report. Each has the cases whose name matches.
var tables = []struct {
	title, match, note string
	columns            []column
}{
	{"The service's path", `^service/`, "TLS, nbdcopy with requests of 2 MiB, 10 in flight on each connection as Xen Orchestra has, " +
		"from a block device of which nothing is in the page cache.", copyColumns},
	{"Whole disks", `^bulk/`, "nbdcopy: connections x requests in flight / size of a request.", copyColumns},
	{"Whole disks, nothing in the page cache", `^cold/.*x`, "The same from a block device.", copyColumns},
	{"Writing a disk", `^write/`, "nbdcopy writes a whole disk and flushes it. file-target is a file; ours is nbd-tool. loop-target is a block device, which " +
		"the service's package blockdev and qemu-nbd (--cache=none) write with O_DIRECT; nbdkit writes to the page cache.", copyColumns},
	{"Nine tenths zeroes, TLS", `^zeros/`, "The image has no holes; pieces of 64 KiB are zero at random.", copyColumns},
	{"Reads at random", `^random/`, "fio on one connection: size of a block / reads in flight. Latencies are fio's.", fioColumns},
	{"Reads at random, nothing in the page cache", `^cold/.*/d`, "The same from a block device; no block is read twice.", fioColumns},
	{"A slow device", `^slow/`, "fio, on a device that waits 2 ms before every read.", fioColumns},
	{"Networks", `^link/`, "nbdcopy through a relay that delays every byte in both directions and does not limit the rate.", copyColumns},
	{"Copies", `^copy/`, "nbd-tool copy, which is ours, and nbdcopy between the same files and exports of nbd-tool serve, each with its defaults. " +
		"The sparse image is four times as large, with data in each 16th MiB.", []column{rateColumn}},
	{"A write through a mirror", `^mirror/latency/`, "One client writes blocks of 4 KiB at random, one at a time, through nbd-tool mirror between two exports of nbd-tool serve: " +
		"while it makes its first copy, without a limit, and while it is paused.", []column{{"median µs", median, true}, {"p99 µs", p99Latency, false}}},
	{"The copy of a mirror", `^mirror/copy/`, "nbd-tool mirror until both ends are equal, which is ours, and nbdcopy, between the same exports, each with its defaults.",
		[]column{rateColumn}},
	{"A mirror that converges", `^mirror/converge$`, "The time until both ends are equal while a client writes 31 MiB/s in blocks of 64 KiB at random, and the bytes that " +
		"are sent to the secondary, for each byte of the disk. qemu is blockdev-mirror of qemu-storage-daemon with the copy-mode write-blocking, qemu-background with its default one.",
		[]column{{"seconds", seconds, true}, {"sent", wireShare, true}}},
	{"Beside connections without progress", `^crowd/`, "One connection with 10 reads of 2 MiB in flight: alone; beside 64 that do not read " +
		"their replies; beside 32 that read 128 KiB/s each; and beside 32 to another disk, which has stalled. All have as many reads in flight.",
		[]column{rateColumn, {"first read µs", meanLatency, false}}},
	{"Sparse disks", `^sparse/`, "The service on a simulated host copies a disk of 64 times the size of the other images, with data in each 32nd block " +
		"of 2 MiB, from a loop device; \"all data\" does so without knowing the blocks; qemu-nbd has a qcow2 image. \"received\" and \"read\" are the bytes that the " +
		"client received and that were read from the loop device, for each byte in a block with data. The client \"simple\" knows simple replies only; it reads an eighth of the disk.",
		wasteColumns},
	{"Increments", `^increment/`, "Pieces of 64 KiB of such a disk have changed, a 16th of the size of the other images in all. qemu-nbd has a bitmap of them.", wasteColumns},
	{"The first sector", `^first-byte$`, "The time from the connect to the first sector, for a disk of 2040 GiB in 4 VHD images with full tables.",
		[]column{{"µs", meanLatency, true}}},
	{"Attachments", `^memory/attachments$`, fmt.Sprintf("Resident memory of the service in MiB before and with %d attached disks.", attachments),
		[]column{{"before", freshMiB, false}, {"attached", rssMiB, false}, {"KiB per attachment", attachKiB, false}}},
	{"Memory", `^memory/idle$`, fmt.Sprintf("Resident memory in MiB after the start and with %d idle connections that have read a block each.", idleConns),
		[]column{{"start", freshMiB, false}, {"idle", rssMiB, true}, {"KiB per connection", connKiB, true}}},
	{"The page cache", `^cache$`, "A whole disk is copied with nbdcopy, from a file of which nothing is in the page cache: the share of it " +
		"that is there afterwards, in per cent. These pages are no longer available to other files.",
		[]column{{"% cached", residentShare, false}, rateColumn}},
}

// markdown is the report.
func (b *bench) markdown(ctx context.Context) string {
	var text strings.Builder
	text.WriteString("# Results of `make bench`\n\n")
	for _, line := range b.preface(ctx) {
		text.WriteString("- " + line + "\n")
	}
	first := b.builds[0].name
	fmt.Fprintf(&text, "\nValues are medians of the rounds. \"%s is\" is %s/other within one round: the median, and the\nsmallest and largest.\n", first, first)
	for _, t := range tables {
		match := regexp.MustCompile(t.match)
		var rows strings.Builder
		for _, name := range b.results.names("", func(s sample) string { return s.Case }) {
			if match.MatchString(name) {
				b.rows(&rows, name, t.columns)
			}
		}
		if rows.Len() == 0 {
			continue
		}
		head, rule := "| case | server |", "| --- | --- |"
		for _, c := range t.columns {
			head, rule = head+" "+c.head+" |", rule+" ---: |"
			if c.ratio {
				head, rule = head+" "+first+" is |", rule+" ---: |"
			}
		}
		fmt.Fprintf(&text, "\n## %s\n\n%s\n\n%s\n%s\n%s", t.title, t.note, head, rule, rows.String())
	}
	return text.String()
}

// rows writes the rows of one case, one for each server.
func (b *bench) rows(text *strings.Builder, name string, columns []column) {
	first := b.builds[0].name
	servers := []string{first} // in this order, though each round begins with another
	for _, s := range b.results.names(name, func(s sample) string { return s.Server }) {
		if s != first {
			servers = append(servers, s)
		}
	}
	for i, s := range servers {
		cell := name
		if i > 0 {
			cell = ""
		}
		fmt.Fprintf(text, "| %s | %s |", cell, s)
		for _, c := range columns {
			fmt.Fprintf(text, " %s |", number(b.results.over(name, s, c.value).median))
			switch {
			case c.ratio && s == first:
				text.WriteString(" |")
			case c.ratio:
				fmt.Fprintf(text, " %s |", ratioText(b.results.ratio(name, first, s, c.value)))
			}
		}
		text.WriteString("\n")
	}
}

// preface returns the circumstances of the run.
func (b *bench) preface(ctx context.Context) []string {
	lines := []string{
		fmt.Sprintf("Command: `go run ./test/bench` with the arguments %q", b.opts.args),
		"Machine: " + machine(),
		"Images: in " + b.where,
		"Versions: " + strings.Join(b.versions(ctx), "; "),
	}
	if b.opts.quick {
		lines = append(lines, "A quick run: the sizes are too small for the numbers to mean anything.")
	}
	for _, s := range b.skipped {
		lines = append(lines, "Not measured: "+s)
	}
	for _, s := range b.results.failures() {
		lines = append(lines, fmt.Sprintf("Failed: %s, %s, round %d: %s", s.Case, s.Server, s.Round, s.Failed))
	}
	return lines
}

func machine() string {
	cpu, gib := runtime.GOARCH, 0.0
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if _, after, ok := strings.Cut(string(text), "model name\t: "); ok {
			cpu, _, _ = strings.Cut(after, "\n")
		}
	}
	if text, err := os.ReadFile("/proc/meminfo"); err == nil {
		gib = float64(procFields(string(text))["MemTotal"]) / (1 << 30)
	}
	kernel := "an unknown kernel"
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		kernel = unix.ByteSliceToString(u.Sysname[:]) + " " + unix.ByteSliceToString(u.Release[:])
	}
	return fmt.Sprintf("%s, %d cores, %.0f GiB of memory, %s", cpu, runtime.NumCPU(), gib, kernel)
}

// versions asks the installed programs for their versions.
func (b *bench) versions(ctx context.Context) []string {
	all := []string{runtime.Version()}
	for _, name := range []string{nbdkit, qemu, "nbdcopy", "fio", qemuStorageDaemon} {
		if path := b.programs[name]; path != "" {
			out, _ := exec.CommandContext(ctx, path, "--version").Output() // unknown, if it fails
			line, _, _ := strings.Cut(string(out), "\n")
			all = append(all, strings.TrimSpace(name+" "+line[strings.LastIndexByte(line, '/')+1:]))
		}
	}
	return all
}

// number writes a value with three digits, and one that was not measured as "-".
func number(v float64) string {
	switch {
	case v == 0:
		return "-"
	case v < 10:
		return fmt.Sprintf("%.2f", v)
	case v < 100:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.0f", v)
}

// ratioText writes the median, and with several rounds the smallest and the largest.
func ratioText(s spread) string {
	switch s.n {
	case 0:
		return "-"
	case 1:
		return fmt.Sprintf("%.2f", s.median)
	}
	return fmt.Sprintf("%.2f (%.2f-%.2f)", s.median, s.min, s.max)
}
