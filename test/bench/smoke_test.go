package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"xapi-nbd/test/requires"
)

// smokeCases are one of each kind, small.
const smokeCases = `^(floor/4|(bulk|random)/file/(clear/1x16/256k|tls/4x64/2m|4k/d16)|zeros/tls/1x16/256k|slow/4k/\dms|link/10ms/1x16/256k|fair/.*|crowd/.*|memory/idle)$`

// bencher runs the program as a user does, and returns its samples and what it
// printed.
func bencher(t *testing.T, args ...string) (samples []sample, text string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "samples.json")
	var out, errOut strings.Builder
	err := run(t.Context(), append(args, "-quick", "-json", file), streams{nil, &out, &errOut})
	if err != nil {
		t.Fatalf("%v\n%s%s", err, out.String(), errOut.String())
	}
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var got struct{ Samples []sample }
	if err := json.Unmarshal(content, &got); err != nil {
		t.Fatal(err)
	}
	return got.Samples, out.String()
}

// tool builds nbd-tool, which several tests need.
func tool(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "nbd-tool")
	if err := buildTool(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	return path
}

// tools ends the test unless the programs are there that all cases need.
func tools(t *testing.T) {
	t.Helper()
	for _, name := range []string{"nbdkit", "qemu-nbd", "nbdcopy", "fio"} {
		requires.Tool(t, name)
	}
}

// measuredIn finds the one sample of a case and a server.
func measuredIn(t *testing.T, samples []sample, name, server string) sample {
	t.Helper()
	i := slices.IndexFunc(samples, func(s sample) bool { return s.Case == name && s.Server == server })
	if i < 0 {
		t.Errorf("%s: no sample of %s", name, server)
		return sample{}
	}
	return samples[i]
}

func TestQuickRun(t *testing.T) {
	tools(t)
	document := filepath.Join(t.TempDir(), "doc.md")
	if err := os.WriteFile(document, []byte("by hand\n"+beginMark+"\nold numbers\n"+endMark+"\nexplained\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	samples, text := bencher(t, "-run", smokeCases, "-o", document, "-tool", tool(t))
	all := []string{ours, nbdkit, qemu}
	const size = 16 << 20
	for _, want := range []struct {
		name    string
		servers []string
		bytes   int64
	}{
		{"bulk/file/clear/1x16/256k", all, size}, {"bulk/file/tls/4x64/2m", all, size}, {"zeros/tls/1x16/256k", all, size},
		{"link/10ms/1x16/256k", all, size / 4}, {"floor/4", []string{splice}, size},
	} {
		for _, server := range want.servers {
			if s := measuredIn(t, samples, want.name, server); s.Bytes != want.bytes || s.Seconds <= 0 || s.CPU <= 0 || s.PeakRSS <= 0 {
				t.Errorf("%s: got %+v, want %d bytes, time, CPU and memory", want.name, s, want.bytes)
			}
		}
	}
	for _, server := range all {
		if s := measuredIn(t, samples, "random/file/4k/d16", server); s.Reads <= 0 || s.Bytes != s.Reads*4096 || s.Mean <= 0 || s.P99 < s.P50 {
			t.Errorf("fio: got %+v", s)
		}
		if s := measuredIn(t, samples, "fair/file/alone", server); s.P50 <= 0 || s.P99 < s.P50 || s.Beside != 0 {
			t.Errorf("alone: got %+v", s)
		}
		if s := measuredIn(t, samples, "fair/file/beside-bulk", server); s.P50 <= 0 || s.Beside <= 0 {
			t.Errorf("not alone: got %+v", s)
		}
		if s := measuredIn(t, samples, "memory/idle", server); s.RSSFresh <= 0 || s.RSS <= s.RSSFresh {
			t.Errorf("idle: got %+v", s)
		}
	}
	for _, server := range []string{ours, nbdkit, direct} {
		// Not more than 16 at a time in 2 ms each, at the very best.
		if s := measuredIn(t, samples, "slow/4k/2ms", server); s.Reads <= 0 || readRate(s) > 8000*1.05 {
			t.Errorf("slow: got %+v", s)
		}
	}
	if s := measuredIn(t, samples, "link/10ms/1x16/256k", ours); s.Seconds < 0.02 {
		t.Errorf("at a distance: got %+v, less than the way there and back", s)
	}
	if s := measuredIn(t, samples, "zeros/tls/1x16/256k", ours); s.Round != 1 {
		t.Errorf("got round %d, want 1: warm-ups do not count", s.Round)
	}
	for _, name := range []string{"alone", "64-stalled", "32-slow"} {
		for _, server := range all {
			if s := measuredIn(t, samples, "crowd/disk/"+name, server); s.Reads <= 0 || s.Bytes != s.Reads*bulkRead || s.Mean <= 0 {
				t.Errorf("%s: got %+v", name, s)
			}
		}
	}
	if s := measuredIn(t, samples, "crowd/disks/stalled-disk", ours); s.Reads <= 0 || s.Mean <= 0 {
		t.Errorf("beside a stalled disk: got %+v", s)
	}
	checkReports(t, text, document)
}

// checkReports looks at what people read.
func checkReports(t *testing.T, text, document string) {
	t.Helper()
	for line := range strings.Lines(text) {
		if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > 100 {
			// A single word, such as an expression, is not broken.
			if strings.ContainsAny(strings.TrimSpace(line), " ") {
				t.Errorf("%d columns: %s", n, line)
			}
		}
	}
	content, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	md := string(content)
	if !strings.HasPrefix(md, "by hand\n"+beginMark) || !strings.HasSuffix(md, endMark+"\nexplained\n") || strings.Contains(md, "old numbers") {
		t.Errorf("the document was not replaced between the marks, or more than that:\n%s", md)
	}
	for _, want := range []string{
		"### Targets", "| bulk clear | nbdkit | ≥ 1.25 |", "| 2 ms device, depth 16 | limit |",
		"nbd-tool serve --listen=127.0.0.1:$PORT $DIR/file.img", "nbdkit -r -f -i 127.0.0.1 -p $PORT file $DIR/file.img",
		"qemu-nbd -r -e 16 -t -f raw", "--requests=16", "--ioengine=nbd", "TLS with GnuTLS's clients: ours: ", "quick run",
	} {
		if !strings.Contains(md, want) {
			t.Errorf("the document lacks %q", want)
		}
	}
	if strings.Contains(md, shmDir+"/nbd-bench") {
		t.Error("the document names folders of this run")
	}
}

func TestQuickRunOnALoopDevice(t *testing.T) {
	tools(t)
	requires.LoopDevices(t)
	samples, text := bencher(t, "-run", `^(bulk/loop/clear/4x64/2m|cold/loop/(4k/d1|1x16/2m))$`, "-tool", tool(t))
	for _, server := range []string{ours, nbdkit, qemu} {
		for _, name := range []string{"bulk/loop/clear/4x64/2m", "cold/loop/1x16/2m"} {
			if s := measuredIn(t, samples, name, server); s.Bytes != 16<<20 {
				t.Errorf("%s: got %+v", name, s)
			}
		}
		if s := measuredIn(t, samples, "cold/loop/4k/d1", server); s.Reads <= 0 {
			t.Errorf("fio: got %+v", s)
		}
	}
	for _, title := range []string{"Reads at random, nothing in the page cache", "Whole disks, nothing in the page cache"} {
		if !strings.Contains(text, title) {
			t.Errorf("the report lacks %q", title)
		}
	}
}

// A device that was dropped has to be waited for.
func TestLoopDeviceIsDropped(t *testing.T) {
	requires.LoopDevices(t)
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, make([]byte, mib), 0o600); err != nil {
		t.Fatal(err)
	}
	loop, err := newLoop(path)
	if err != nil {
		t.Fatal(err)
	}
	defer loop.close()
	f, err := os.Open(loop.path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	block := make([]byte, 4*kib)
	for range 2 {
		if _, err := f.ReadAt(make([]byte, mib), 0); err != nil {
			t.Fatal(err)
		}
		if n, err := unix.Preadv2(int(f.Fd()), [][]byte{block}, mib/2, unix.RWF_NOWAIT); n != len(block) {
			t.Fatalf("a block that was just read is not in the page cache: got %d, %v", n, err)
		}
		if err := loop.drop(); err != nil {
			t.Fatal(err)
		}
		if n, err := unix.Preadv2(int(f.Fd()), [][]byte{block}, mib/2, unix.RWF_NOWAIT); err != unix.EAGAIN {
			t.Errorf("after drop: got %d, %v, want EAGAIN", n, err)
		}
	}
}

func TestQuickRunOfThePageCache(t *testing.T) {
	tools(t)
	requires.Root(t)
	samples, text := bencher(t, "-run", `^cache$`, "-tool", tool(t))
	if len(samples) == 0 {
		_, reason, _ := strings.Cut(text, "Not measured: ")
		if reason == "" {
			t.Fatalf("neither samples nor a reason:\n%s", text)
		}
		t.Skip(reason)
	}
	for _, server := range []string{ours, nbdkit, qemu} {
		if s := measuredIn(t, samples, "cache", server); s.Resident == nil || *s.Resident < 0 || *s.Resident > 1 || s.Bytes != 128<<20 {
			t.Errorf("got %+v", s)
		}
	}
}

// TestWrongBytesEndTheRun: a server that serves another image than it should
// is not measured.
func TestWrongBytesEndTheRun(t *testing.T) {
	requires.Tool(t, "nbdcopy")
	b, err := newBench(t.Context(), options{size: 16 << 20, tool: "unused"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := b.close(); err != nil {
			t.Error(err)
		}
	}()
	image, err := b.images.path(t.Context(), fileImage)
	if err != nil {
		t.Fatal(err)
	}
	e := env{image: fileImage, device: fastDevice}
	s, err := b.start(t.Context(), kinds(e)[0], e, "")
	if err != nil {
		t.Fatal(err)
	}
	defer s.stop()
	if err := b.verify(t.Context(), s); err != nil {
		t.Errorf("the right bytes: %v", err)
	}
	// It serves what it has open; the comparison is with another file then.
	other := filepath.Join(t.TempDir(), "other.img")
	content, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	const wrong = 9<<20 + 77
	content[wrong]++
	if err := os.WriteFile(other, content, 0o600); err != nil {
		t.Fatal(err)
	}
	b.images.paths[fileImage] = other
	if err := b.verify(t.Context(), s); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("byte %d differs", wrong)) {
		t.Errorf("got error %v, want one about byte %d", err, wrong)
	}
	for i := range content {
		content[i]++
	}
	if err := os.WriteFile(other, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := verifyReads(t.Context(), s, other); err == nil || !strings.Contains(err.Error(), "differ") {
		t.Errorf("reads at random: got error %v", err)
	}
}

// cancelAt cancels when something is written that contains a word.
type cancelAt struct {
	word   string
	cancel context.CancelCauseFunc
}

var errEnough = errors.New("enough")

func (c cancelAt) Write(p []byte) (int, error) {
	if strings.Contains(string(p), c.word) {
		c.cancel(errEnough)
	}
	return len(p), nil
}

// TestInterrupted also looks at the order of rounds. An interrupted run leaves no process and no folder, and says
// that it was interrupted.
func TestInterrupted(t *testing.T) {
	tools(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	b, err := newBench(ctx, options{size: 16 << 20, quick: true, warmUp: true, rounds: 3, tool: tool(t)}, cancelAt{"round 2 of 3", cancel})
	if err != nil {
		t.Fatal(err)
	}
	err = b.run(ctx, slices.DeleteFunc(allCases(), func(c testCase) bool { return c.name != "bulk/file/clear/1x16/256k" }))
	if !errors.Is(err, errEnough) {
		t.Errorf("got error %v, want %v", err, errEnough)
	}
	if err := b.close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(b.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is still there (error %v)", b.dir, err)
	}
	if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); !errors.Is(err, syscall.ECHILD) {
		t.Errorf("got process %d and error %v, want no child at all", pid, err)
	}
	var got []string
	for _, s := range b.results.samples {
		got = append(got, fmt.Sprint(s.Round, " ", s.Server))
	}
	// The warm-up does not count, and another server begins each round.
	want := []string{"1 nbdkit", "1 qemu-nbd", "1 ours", "2 qemu-nbd", "2 ours", "2 nbdkit"}
	if !slices.Equal(got, want) {
		t.Errorf("got the samples %q, want %q", got, want)
	}
}
