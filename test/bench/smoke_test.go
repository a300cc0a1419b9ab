package main

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"xapi-nbd/test/requires"
)

const quickSize = 16 << 20 // of the image with -quick

var allServers = []string{ours, nbdkit, qemu}

// bencher runs cases as a user does, quickly, and returns the results and the output.
func bencher(t *testing.T, args ...string) (results, string) {
	t.Helper()
	for _, name := range []string{"nbdkit", "qemu-nbd", "nbdcopy", "fio"} {
		requires.Tool(t, name)
	}
	o, err := parseOptions(append(args, "-quick"), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	var out, progress strings.Builder
	r, err := measureAll(t.Context(), o, pick(allCases(), o.run), &out, &progress)
	if err != nil {
		t.Fatalf("%v\n%s%s", err, out.String(), progress.String())
	}
	return r, out.String()
}

// check looks at the one sample of a case for each server.
func check(t *testing.T, r results, name string, servers []string, good func(sample) bool) {
	t.Helper()
	for _, server := range servers {
		samples := r.rounds(name, server)
		if s, ok := samples[1]; !ok || len(samples) != 1 || !good(s) {
			t.Errorf("%s, %s: got %+v", name, server, samples)
		}
	}
}

func TestQuickRun(t *testing.T) {
	document := filepath.Join(t.TempDir(), "doc.md")
	r, text := bencher(t, "-o", document, "-run",
		`^(bulk/file/clear/1x16/256k|bulk/file/tls/4x64/2m|random/file/4k/d16|zeros/tls/1x16/256k|slow/4k/.*|link/(200µs|10ms)/1x16/256k|crowd/.*|memory/idle|write/file-target/(clear/1x16/256k|tls/4x64/2m))$`)
	copied := func(bytes int64) func(sample) bool {
		return func(s sample) bool { return s.Bytes == bytes && s.Seconds > 0 && s.CPU > 0 && s.PeakRSS > 0 }
	}
	check(t, r, "bulk/file/clear/1x16/256k", allServers, copied(quickSize))
	check(t, r, "bulk/file/tls/4x64/2m", allServers, copied(quickSize))
	check(t, r, "zeros/tls/1x16/256k", allServers, copied(quickSize))
	check(t, r, "write/file-target/clear/1x16/256k", allServers, copied(quickSize))
	check(t, r, "write/file-target/tls/4x64/2m", allServers, copied(quickSize))
	check(t, r, "link/200µs/1x16/256k", allServers, copied(quickSize/4))
	check(t, r, "link/10ms/1x16/256k", allServers, func(s sample) bool {
		return copied(quickSize/4)(s) && s.Seconds >= 0.02 // one round trip
	})
	check(t, r, "random/file/4k/d16", allServers, func(s sample) bool {
		return s.Reads > 0 && s.Bytes == s.Reads*4096 && s.Mean > 0 && s.P99 > 0
	})
	check(t, r, "slow/4k/d16", []string{ours, nbdkit}, func(s sample) bool {
		return s.Reads > 0 && readRate(s) <= slowDepth/slowDelay.Seconds()*1.05
	})
	check(t, r, "memory/idle", allServers, func(s sample) bool { return s.RSSFresh > 0 && s.RSS > s.RSSFresh })
	for _, name := range []string{"alone", "64-stalled", "32-slow"} {
		check(t, r, "crowd/disk/"+name, allServers, func(s sample) bool { return s.Reads > 0 && s.Bytes == s.Reads*bulkRead && s.Mean > 0 })
	}
	check(t, r, "crowd/disks/stalled-disk", []string{ours}, func(s sample) bool { return s.Reads > 0 && s.Mean > 0 })
	content, err := os.ReadFile(document)
	if err != nil || string(content) != text {
		t.Errorf("error %v; got the document\n%s\nwant\n%s", err, content, text)
	}
	if !strings.Contains(text, "quick run") || strings.Contains(text, shmDir+"/nbd-bench") {
		t.Errorf("the report does not say that this was a quick run, or names folders of this run:\n%s", text)
	}
}

func TestQuickRunOnALoopDevice(t *testing.T) {
	requires.LoopDevices(t)
	r, text := bencher(t, "-run", `^(bulk/loop/clear/4x64/2m|cold/clear/(4k/d1|1x16/2m)|service/tls/1x10/2m|write/loop-target/.*/1x16/2m)$`)
	for _, name := range []string{
		"bulk/loop/clear/4x64/2m", "cold/clear/1x16/2m", "service/tls/1x10/2m", "write/loop-target/clear/1x16/2m", "write/loop-target/tls/1x16/2m",
	} {
		check(t, r, name, allServers, func(s sample) bool { return s.Bytes == quickSize })
	}
	check(t, r, "cold/clear/4k/d1", allServers, func(s sample) bool { return s.Reads > 0 })
	for _, title := range []string{"The service's path", "Reads at random, nothing in the page cache", "Whole disks, nothing in the page cache"} {
		if !strings.Contains(text, "\n## "+title+"\n") {
			t.Errorf("the report lacks %q", title)
		}
	}
}

// TestQuickRunOfCopies: both clients copy all that there is between all ends.
func TestQuickRunOfCopies(t *testing.T) {
	r, _ := bencher(t, "-run", `^copy/`)
	for _, name := range []string{"export-to-file/clear", "file-to-export/clear", "export-to-export/clear", "export-to-export/tls"} {
		check(t, r, "copy/"+name, []string{ours, nbdcopy}, func(s sample) bool { return s.Bytes == quickSize && s.Seconds > 0 })
	}
	check(t, r, "copy/sparse-export-to-export/clear", []string{ours, nbdcopy}, func(s sample) bool { return s.Bytes == holesTimes*quickSize })
}

// TestQuickRunOfMirrors: all mirrors copy what clients write meanwhile.
func TestQuickRunOfMirrors(t *testing.T) {
	requires.Tool(t, qemuStorageDaemon)
	r, _ := bencher(t, "-run", `^mirror/`)
	check(t, r, "mirror/latency/4k", []string{ours, pausedMirror}, func(s sample) bool { return s.Reads > 0 && s.Median > 0 })
	check(t, r, "mirror/copy/clear", []string{ours, nbdcopy}, func(s sample) bool { return s.Bytes == quickSize && s.Seconds > 0 })
	check(t, r, "mirror/converge", []string{ours, qemuMirror, qemuBackground}, func(s sample) bool { return s.Seconds > 0 && wireShare(s) >= 1 })
}

// TestQuickRunOfTheService also asserts how few bytes are moved.
func TestQuickRunOfTheService(t *testing.T) {
	requires.LoopDevices(t)
	requires.Tool(t, "qemu-img")
	r, _ := bencher(t, "-run", `^(sparse/.*|increment/.*|first-byte|memory/attachments)$`)
	const most = 1.02
	counted := func(wire, device float64) func(sample) bool {
		return func(s sample) bool {
			return s.Needed > 0 && s.Seconds > 0 && wireShare(s) <= wire && deviceShare(s) >= 1 && deviceShare(s) <= device
		}
	}
	for _, name := range []string{"sparse/clear/nbdcopy", "sparse/tls/nbdcopy", "sparse/clear/nbd-tool"} {
		check(t, r, name, []string{ours}, counted(most, most))
		check(t, r, name, []string{qemu}, counted(most, 2))
		check(t, r, name, []string{allData}, counted(most, 2*sparseEvery))
	}
	check(t, r, "sparse/clear/simple", []string{ours}, counted(most*sparseEvery, most))
	check(t, r, "increment/nbd-tool", []string{ours}, counted(most, most))
	check(t, r, "increment/nbd-tool", []string{qemu}, counted(most, 2))
	check(t, r, "increment/qemu-img", []string{ours}, counted(most, most))
	check(t, r, "first-byte", []string{ours, allData}, func(s sample) bool { return s.Mean > 0 })
	check(t, r, "memory/attachments", []string{ours}, func(s sample) bool { return s.RSS > 0 && attachKiB(s) <= 1024 })
}

// TestPairs compares this checkout with itself.
func TestPairs(t *testing.T) {
	r, text := bencher(t, "-old", "../..", "-run", `^(bulk/file/clear/1x16/256k|slow/4k/d16|crowd/disks/alone)$`)
	for _, name := range []string{"bulk/file/clear/1x16/256k", "slow/4k/d16", "crowd/disks/alone"} {
		check(t, r, name, []string{"new", "old"}, func(s sample) bool { return s.Bytes > 0 })
	}
	if !strings.Contains(text, "| new is |") || strings.Contains(text, "| "+nbdkit+" |") {
		t.Errorf("no ratios of the new build, or other servers:\n%s", text)
	}
}

// TestLoopDeviceIsDropped: after drop no block of the device is in the page cache.
func TestLoopDeviceIsDropped(t *testing.T) {
	requires.LoopDevices(t)
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, make([]byte, mib), 0o600); err != nil {
		t.Fatal(err)
	}
	loop, err := newLoop(t.Context(), path, "--read-only")
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
	r, text := bencher(t, "-run", `^cache$`)
	if len(r) == 0 {
		_, reason, _ := strings.Cut(text, "Not measured: ")
		if reason == "" {
			t.Fatalf("neither samples nor a reason:\n%s", text)
		}
		t.Skip(reason)
	}
	check(t, r, "cache", []string{nbdkit, qemu}, func(s sample) bool { return *s.Resident > 0.9 && s.Bytes == quickSize })
	check(t, r, "cache", []string{ours}, func(s sample) bool { return *s.Resident <= 1 && s.Bytes == quickSize })
}

// newQuickBench returns a bench that the test closes.
func newQuickBench(t *testing.T, ctx context.Context, rounds int, progress io.Writer) *bench {
	t.Helper()
	b, err := newBench(ctx, options{size: quickSize, quick: true, warmUp: true, rounds: rounds}, progress)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestWrongBytesEndTheRun: a server that serves one wrong byte is not measured.
func TestWrongBytesEndTheRun(t *testing.T) {
	b := newQuickBench(t, t.Context(), 1, io.Discard)
	defer func() {
		if err := b.close(); err != nil {
			t.Error(err)
		}
	}()
	image, err := b.images.path(t.Context(), fileImage)
	if err != nil {
		t.Fatal(err)
	}
	e := env{image: fileImage, device: stalledDevice}
	s, err := b.start(t.Context(), b.kinds(e)[0], e)
	if err != nil {
		t.Fatal(err)
	}
	defer s.stop()
	if err := b.verify(t.Context(), s); err != nil {
		t.Errorf("the right bytes: %v", err)
	}
	content, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(t.TempDir(), "other.img")
	b.images.paths[fileImage] = other
	for _, wrong := range []int{0, 9<<20 + 77, quickSize - 1} {
		content[wrong]++
		if err := os.WriteFile(other, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := b.verify(t.Context(), s); err == nil || !strings.Contains(err.Error(), "wrong bytes") {
			t.Errorf("byte %d is wrong: got error %v", wrong, err)
		}
		content[wrong]--
	}
}

// cancelAt cancels when a line that contains a word is written.
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

// TestInterrupted: an interrupted run returns the cause and leaves no process and no folder.
// It also shows that each round begins with another server and that the warm-up is not kept.
func TestInterrupted(t *testing.T) {
	for _, name := range []string{"nbdkit", "qemu-nbd", "nbdcopy"} {
		requires.Tool(t, name)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	b := newQuickBench(t, ctx, 3, cancelAt{"round 2 of 3", cancel})
	err := b.run(ctx, slices.DeleteFunc(allCases(), func(c testCase) bool { return c.name != "bulk/file/clear/1x16/256k" }))
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
	for _, s := range b.results {
		got = append(got, string(rune('0'+s.Round))+" "+s.Server)
	}
	if want := []string{"1 nbdkit", "1 qemu-nbd", "1 ours", "2 qemu-nbd", "2 ours", "2 nbdkit"}; !slices.Equal(got, want) {
		t.Errorf("got the samples %q, want %q", got, want)
	}
}
