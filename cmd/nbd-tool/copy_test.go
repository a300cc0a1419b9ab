package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"xapi-nbd/cmd/nbd-tool/internal/extents"
	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

// All kinds of source are copied to all kinds of destination, with sizes that are multiples of
// the block size and sizes that are not.
func TestCopyMatrix(t *testing.T) {
	sizes := []int{0, 1, 511, 5*4096 + 67, 256 << 10, 1<<20 + 513}
	flags := [][]string{{"--connections=1", "--requests=1"}, {"--connections=3", "--requests=5", "--verify"}}
	for _, size := range sizes {
		want := content(size)
		for _, from := range []string{"nbd", "file", "sparse"} {
			for _, to := range []string{"nbd", "file", "existing", "stream"} {
				for _, extra := range flags {
					name := fmt.Sprintf("%s to %s, %d bytes, %s", from, to, size, extra[0])
					t.Run(name, func(t *testing.T) { copyCase(t, want, from, to, extra) })
				}
			}
		}
	}
}

func copyCase(t *testing.T, want []byte, from, to string, flags []string) {
	var src string
	switch from {
	case "nbd":
		src = serveRAM(t, nbdtest.NewRAM(want))
	case "file":
		src = writeFile(t, "src", want)
	default:
		src = sparseFile(t, want)
	}
	args := append([]string{"copy", src}, flags...)
	old := bytes.Repeat([]byte{0xee}, len(want))
	switch to {
	case "nbd":
		ram := nbdtest.NewRAM(old)
		succeed(t, append(args, serveRAM(t, ram))...)
		sameBytes(t, "on stable storage", ram.Stable(), want)
	case "stream":
		out := succeed(t, append(args[:len(args):len(args)], "--verify=false", "-")...)
		sameBytes(t, "stream", []byte(out), want)
	default:
		dst := filepath.Join(t.TempDir(), "dst")
		if to == "existing" {
			dst = writeFile(t, "dst", append(old, "and more"...))
		}
		succeed(t, append(args, dst)...)
		sameBytes(t, "file", readFile(t, dst), want)
	}
}

// sparseFile makes a file with holes in place of zeroes.
func sparseFile(t *testing.T, content []byte) string {
	t.Helper()
	path := writeFile(t, "sparse", nil)
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for off := 0; off < len(content); off += 4096 {
		block := content[off:min(off+4096, len(content))]
		if bytes.Count(block, []byte{0}) == len(block) {
			continue
		}
		if _, err := f.WriteAt(block, int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(int64(len(content))); err != nil {
		t.Fatal(err)
	}
	return path
}

// Both ends may need whole blocks. The source may end inside a block of the destination; the
// rest of that block stays as it is.
func TestCopyKeepsToBlockSizes(t *testing.T) {
	const size = 70*4096 + 67
	want := content(size)
	src := nbdtest.NewRAM(want[:70*4096])
	src.Min, src.Preferred = 4096, 4096
	dst := nbdtest.NewRAM(bytes.Repeat([]byte{0xee}, 80*4096))
	dst.Min, dst.Preferred = 4096, 4096
	for _, tt := range []struct {
		name, src string
		size      int
	}{{"whole", serveRAM(t, src), 70 * 4096}, {"tail", sparseFile(t, want), size}, {"dense tail", writeFile(t, "src", want), size}} {
		t.Run(tt.name, func(t *testing.T) {
			r := tool(t, "copy", "--verify", "--larger-destination", tt.src, serveRAM(t, dst))
			if r.code != exitOK || !strings.Contains(r.err, fmt.Sprintf("last %d bytes stay", 80*4096-tt.size)) {
				t.Errorf("exit code %d, error output %q", r.code, r.err)
			}
			got := dst.Content()
			sameBytes(t, "copied", got[:tt.size], want[:tt.size])
			sameBytes(t, "behind it", got[tt.size:], bytes.Repeat([]byte{0xee}, len(got)-tt.size))
		})
	}
}

// A hole of the source is a hole of the copy, whether the source has extents or not.
func TestCopyKeepsHoles(t *testing.T) {
	want := make([]byte, 8<<20)
	nbdtest.Fill(want[3<<20:3<<20+4096], 0, 1)
	plain := func() nbd.Device { return nbdtest.MemOf(want) } // knows no extents
	for name, src := range map[string]string{
		"knows": serveRAM(t, nbdtest.NewRAM(want)), "does not": serveOne(t, plain), "file": sparseFile(t, want),
	} {
		t.Run(name, func(t *testing.T) {
			dst := filepath.Join(t.TempDir(), "dst")
			succeed(t, "copy", "--verify", src, dst)
			sameBytes(t, "file", readFile(t, dst), want)
			st, err := os.Stat(dst)
			if err != nil {
				t.Fatal(err)
			}
			if used := st.Sys().(*syscall.Stat_t).Blocks * 512; used > 1<<20 {
				t.Errorf("the file takes %d bytes of storage, want about 4096", used)
			}
		})
	}
	t.Run("to an export", func(t *testing.T) {
		ram := nbdtest.NewRAM(bytes.Repeat([]byte{1}, len(want)))
		opened := []*nbdtest.RAM{}
		dst := serveOne(t, func() nbd.Device { opened = append(opened, ram.Again()); return opened[len(opened)-1] })
		succeed(t, "copy", "--connections=1", sparseFile(t, want), dst)
		sameBytes(t, "export", ram.Content(), want)
		if calls := opened[0].Calls(); calls.Writes > 1 || calls.Zeroes != 2 {
			t.Errorf("%d writes and %d zeroings, want 1 and 2", calls.Writes, calls.Zeroes)
		}
	})
}

// With --destination-is-zero ranges of zeroes are not written.
func TestCopyToZero(t *testing.T) {
	want := content(2 << 20)
	ram := nbdtest.NewRAM(make([]byte, len(want)))
	opened := []*nbdtest.RAM{}
	dst := serveOne(t, func() nbd.Device { opened = append(opened, ram.Again()); return opened[len(opened)-1] })
	succeed(t, "copy", "--destination-is-zero", "--connections=1", writeFile(t, "src", want), dst)
	sameBytes(t, "export", ram.Content(), want)
	if calls := opened[0].Calls(); calls.Zeroes != 0 {
		t.Errorf("%d zeroings, want none", calls.Zeroes)
	}
}

// stubborn is a device without WriteZeroes and without extents.
type stubborn struct{ *nbdtest.RAM }

func (stubborn) WriteZeroes(int64, int64, bool, bool) error  { return wire.ENOTSUP }
func (stubborn) Extents(int64, int64) ([]wire.Extent, error) { return nil, wire.EIO }
func (s stubborn) open() nbd.Device                          { return stubborn{s.Again()} }

func TestCopyCopesWithRefusals(t *testing.T) {
	want := content(3<<20 + 100)
	src, dst := stubborn{nbdtest.NewRAM(want)}, stubborn{nbdtest.NewRAM(bytes.Repeat([]byte{1}, len(want)))}
	succeed(t, "copy", "--verify", serveOne(t, src.open), serveOne(t, dst.open))
	sameBytes(t, "export", dst.Content(), want)
	succeed(t, "copy", "--verify", sparseFile(t, want), serveOne(t, dst.open))
	sameBytes(t, "export again", dst.Content(), want)
}

func TestCopyErrors(t *testing.T) {
	const size = 1 << 20
	want := content(size)
	src := writeFile(t, "src", want)
	faulty := func(spoil func(*nbdtest.FaultyRAM)) string {
		return serveOne(t, func() nbd.Device {
			f := nbdtest.NewFaultyRAM(nbdtest.NewRAM(bytes.Repeat([]byte{1}, size)))
			spoil(f)
			return f
		})
	}
	badAt := faulty(func(f *nbdtest.FaultyRAM) { f.Fail(600<<10, 1, syscall.ENOSPC) })
	noFlush := faulty(func(f *nbdtest.FaultyRAM) { f.FailFlush(syscall.EIO) })
	readOnly := serveOne(t, func() nbd.Device { return nbdtest.NewMem(size, 1) })
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(src, link); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "out")
	tests := []struct {
		name string
		args []string
		code int
		want []string
	}{
		{"destination full", []string{src, badAt}, exitFailed, []string{"stopped after ", " of 1048576 bytes", "is incomplete", "NBD_ENOSPC", "offset "}},
		{"source unreadable", []string{badAt, out}, exitFailed, []string{"is incomplete", "reading", "NBD_ENOSPC"}},
		{"stream from unreadable", []string{badAt, "-"}, exitFailed, []string{"what was written is incomplete"}},
		{"not flushed", []string{src, noFlush}, exitFailed, []string{"incomplete", "flushing", "NBD_EIO"}},
		{"read-only", []string{src, readOnly}, exitFailed, []string{"the export is read-only"}},
		{"too small", []string{writeFile(t, "large", make([]byte, size+1)), badAt}, exitFailed, []string{"is too small: 1048576 bytes, the source has 1048577"}},
		{"no source", []string{"/no/such/file", out}, exitFailed, []string{"/no/such/file", "no such file"}},
		{"no folder", []string{src, "/no/such/file"}, exitFailed, []string{"/no/such/file"}},
		{"to a folder", []string{src, t.TempDir()}, exitFailed, []string{"neither"}},
		{"to a pipe", []string{src, fifo}, exitFailed, []string{"neither a file nor a block device"}},
		{"to itself", []string{src, src}, exitUsage, []string{"both source and destination"}},
		{"to itself by a link", []string{src, link}, exitUsage, []string{"both source and destination"}},
		{"from a stream", []string{"-", out}, exitUsage, []string{"size is not known"}},
		{"verify a stream", []string{"--verify", src, "-"}, exitUsage, []string{"--verify"}},
		{"connections", []string{"--connections=0", src, out}, exitUsage, []string{"--connections is 1 to 64"}},
		{"requests", []string{"--requests=257", src, out}, exitUsage, []string{"--requests is 1 to 256"}},
		{"one argument", []string{src}, exitUsage, []string{"want SRC and DST"}},
		{"three arguments", []string{src, src, src}, exitUsage, []string{"want SRC and DST"}},
		{"scheme", []string{"http://host/a", out}, exitUsage, []string{"nbd+unix"}},
		{"old syntax", []string{"nbd:localhost:10809", out}, exitUsage, []string{"slashes"}},
		{"CA without TLS", []string{"--tls-ca", src, src, out}, exitUsage, []string{"nbds"}},
		{"two URIs from one input", []string{"--uri-file=-", "--dst-uri-file=-"}, exitUsage, []string{"one URI"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := toolWith(t, t.Context(), "nbd://127.0.0.1:1/", append([]string{"copy"}, tt.args...)...)
			checkFailure(t, r, tt.code, tt.want...)
		})
	}
	sameBytes(t, "the source, after all that", readFile(t, src), want)
}

// TestCopyOpensTheSourceFirst: the destination is not changed if the source cannot be opened.
func TestCopyOpensTheSourceFirst(t *testing.T) {
	old := content(1 << 20)
	dst := writeFile(t, "dst", old)
	for _, src := range []string{"nbd+unix:///x?socket=/no/such/socket", serve(t, &nbdtest.Exporter{}) + "x", "/no/such/file"} {
		if r := tool(t, "copy", src, dst); r.code != exitFailed {
			t.Errorf("%s: exit code %d", src, r.code)
		}
	}
	sameBytes(t, "the destination", readFile(t, dst), old)
}

// SIGINT ends the copy at once, with a message about the incomplete destination.
func TestCopyInterrupted(t *testing.T) {
	held := make(chan struct{})
	defer close(held)
	arrivals := make(chan struct{}, 1000)
	uri := serveOne(t, func() nbd.Device { return &holding{nbdtest.NewMem(1<<20, 1), arrivals, held} })
	for _, dst := range []string{filepath.Join(t.TempDir(), "dst"), "-"} {
		ctx, cancel := context.WithCancelCause(t.Context())
		go func() {
			<-arrivals
			cancel(errors.New("interrupt signal received"))
		}()
		r := toolWith(t, ctx, "", "copy", "--connections=1", "--requests=1", uri, dst)
		checkFailure(t, r, exitFailed, "stopped after 0 of 1048576 bytes", "is incomplete: interrupt signal received")
		cancel(nil)
	}
}

// A server that goes away in the middle.
func TestCopyConnectionLost(t *testing.T) {
	s := &nbd.Server{Exporter: exporterFunc(func(string) (nbd.Device, error) { return nbdtest.NewMem(8<<20, 1), nil })}
	nc := nbdtest.Serve(t, s)()
	addr := nc.RemoteAddr().String()
	nc.Close()
	stop := &stopping{n: 1 << 20, stop: func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		_ = s.Shutdown(ctx)
	}}
	var errOut bytes.Buffer
	code := run(t.Context(), []string{"copy", "nbd://" + addr + "/", "-", "--requests=1", "--retry-for=200ms"}, streams{nil, stop, &errOut})
	checkFailure(t, result{code: code, err: errOut.String()}, exitFailed, "of 8388608 bytes", "is incomplete")
}

// stopping calls stop when n bytes were written.
type stopping struct {
	n    int
	stop func()
}

func (s *stopping) Write(p []byte) (int, error) {
	if s.n > 0 && s.n <= len(p) {
		s.stop()
	}
	s.n -= len(p)
	return len(p), nil
}

// The progress counts the bytes that have to be read, and --verify those it compares.
func TestCopyProgressLines(t *testing.T) {
	const all = 64 << 20
	sparse := writeFile(t, "sparse", content(1<<20))
	if err := os.Truncate(sparse, all); err != nil {
		t.Fatal(err)
	}
	disk := newChangedDisk()
	for _, tt := range []struct {
		name, dst        string
		copied, compared int64
		args             []string
	}{
		{"data", "", 1 << 20, 1 << 20, []string{writeFile(t, "src", content(1<<20))}},
		{"file with a hole", "", 1 << 20, all, []string{sparse}},
		{"export with holes", "", 64 << 10, 1 << 20, []string{showURI(t)}},
		{"changed blocks", writeFile(t, "copy", disk.base), disk.data, disk.data + changedUnit,
			[]string{"--changed-since", baseName, disk.serve(t, extents.UnchangedContext+baseName)}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dst := cmp.Or(tt.dst, filepath.Join(t.TempDir(), "dst"))
			r := tool(t, append(append([]string{"copy", "--progress", "--verify"}, tt.args...), dst)...)
			if r.code != exitOK || r.out != "" {
				t.Fatalf("exit code %d, output %q, errors %q", r.code, r.out, r.err)
			}
			for label, n := range map[string]int64{"copying": tt.copied, "verifying": tt.compared} {
				if want := fmt.Sprintf("%s: 100.0 %%, %d of %d bytes", label, n, n); !strings.Contains(r.err, want) {
					t.Errorf("got %q, want %q in it", r.err, want)
				}
			}
		})
	}
}
