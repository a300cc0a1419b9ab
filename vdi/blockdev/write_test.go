package blockdev

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"xapi-nbd/internal/pagecache"
	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/test/requires"
)

// export is a Device as an export of package nbd. It has its real capabilities, and closes
// nothing.
type export struct{ *Device }

var _ interface {
	nbd.Writer
	nbd.Flusher
	nbd.FUAWriter
	nbd.Trimmer
	nbd.ZeroWriter
	nbd.MultiConner
} = export{}

func (export) Close() error { return nil }

// diskFolder returns a folder that is not on a file system in memory.
func diskFolder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "write")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	requires.DirectIO(t, dir)
	return dir
}

// newImage makes a file of size bytes, none of which is zero.
func newImage(t *testing.T, dir string, size int) string {
	t.Helper()
	path := filepath.Join(dir, "image")
	if err := os.WriteFile(path, bytes.Repeat([]byte("image of a disk "), size/16+1)[:size], 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func openForWriting(t *testing.T, path string) *Device {
	t.Helper()
	d, err := Open(t.Context(), path, Options{Write: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// alone is a Device of which there can be only one.
type alone struct{ *Device }

func (alone) MultiConn() bool { return false }

// Devices of each kind obey the contract of package nbd: at any alignment, concurrently, past
// the end, with zeroes and trims.
func TestWritableDevice(t *testing.T) {
	tests := []struct {
		name   string
		path   func(t *testing.T) string
		direct bool
	}{
		{"a file", func(t *testing.T) string { return newImage(t, diskFolder(t), 1<<20) }, true},
		{"a file that is no multiple of blocks", func(t *testing.T) string { return newImage(t, diskFolder(t), 1<<20+77) }, false},
		{"a loop device", func(t *testing.T) string { return requires.Loop(t, newImage(t, diskFolder(t), 1<<20)) }, true},
		{"a loop device with sectors of 4096 bytes", func(t *testing.T) string {
			return requires.Loop(t, newImage(t, diskFolder(t), 1<<20), "--sector-size", "4096")
		}, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := tt.path(t)
			nbdtest.TestDevice(t, func() nbd.Device {
				d, err := Open(t.Context(), path, Options{Write: true})
				if err != nil {
					t.Fatal(err)
				}
				if d.Direct() != tt.direct || d.File() != nil {
					t.Errorf("direct: got %t, want %t; its file is given away: %t", d.Direct(), tt.direct, d.File() != nil)
				}
				if d.isFile() {
					return d
				}
				return alone{d}
			})
		})
	}
}

// TestWritesLeaveThePageCacheAlone: written data of any alignment is not in the page cache: it
// has reached the device, and a restore leaves the cache as it was.
func TestWritesLeaveThePageCacheAlone(t *testing.T) {
	const size = 4 << 20
	path := requires.Loop(t, newImage(t, diskFolder(t), size))
	d := openForWriting(t, path)
	for i, n := range []int64{size / 4, size/4 - 999} {
		if _, err := d.WriteAt(make([]byte, n), int64(i)*size/2); err != nil {
			t.Fatal(err)
		}
	}
	for off := int64(0); off < size; off += 4096 {
		if cached, err := pagecache.Resident(int(d.f.Fd()), off); cached || err != nil {
			t.Fatalf("the page at %d: in the page cache %t, %v, want it not there", off, cached, err)
		}
	}
}

// A block device that another program has claimed is not opened for writing, and nobody can
// claim it while it is open.
func TestWritableDeviceIsExclusive(t *testing.T) {
	path := requires.Loop(t, newImage(t, diskFolder(t), 1<<20))
	d := openForWriting(t, path)
	// Not Open, which waits 5 s for the other program.
	if other, err := open(path, Options{Write: true, Roots: Roots{}.withDefaults()}); !errors.Is(err, unix.EBUSY) || !mayPass(err) {
		t.Errorf("opened again: got %v, want EBUSY, which may pass", err)
		if err == nil {
			other.Close()
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	openForWriting(t, path)
}

func TestWritableDeviceIsReadOnly(t *testing.T) {
	path := requires.Loop(t, newImage(t, diskFolder(t), 1<<20), "--read-only")
	if _, err := Open(t.Context(), path, Options{Write: true}); !errors.Is(err, unix.EROFS) && !errors.Is(err, unix.EACCES) {
		t.Errorf("got %v, want EROFS", err)
	}
}

// A device that was opened for reading refuses everything that changes it.
func TestReadOnlyDeviceRefusesWrites(t *testing.T) {
	d, err := Open(t.Context(), newImage(t, t.TempDir(), 4096), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for name, call := range changesOf(d) {
		if err := call(512, 512); !errors.Is(err, unix.EBADF) {
			t.Errorf("%s: got %v, want EBADF", name, err)
		}
	}
	if err := d.Flush(); !errors.Is(err, unix.EBADF) || d.CanTrim() {
		t.Errorf("flush: got %v, want EBADF; can trim: %t", err, d.CanTrim())
	}
}

// changesOf returns the methods that change a range.
func changesOf(d *Device) map[string]func(off, n int64) error {
	p := bytes.Repeat([]byte{7}, 1<<20)
	return map[string]func(off, n int64) error{
		"write": func(off, n int64) error {
			_, err := d.WriteAt(p[:max(n, 0)], off)
			return err
		},
		"write, FUA":            func(off, n int64) error { return d.WriteFUA(p[:max(n, 0)], off) },
		"zeroes":                func(off, n int64) error { return d.WriteZeroes(off, n, false, false) },
		"zeroes without a hole": func(off, n int64) error { return d.WriteZeroes(off, n, true, false) },
		"zeroes, FUA":           func(off, n int64) error { return d.WriteZeroesFUA(off, n, false, false) },
		"trim":                  d.Trim,
		"trim, FUA":             d.TrimFUA,
	}
}

// Ranges outside the device fail, and the file does not grow.
func TestWritesOutsideTheDevice(t *testing.T) {
	path := newImage(t, diskFolder(t), 8192)
	d := openForWriting(t, path)
	for name, call := range changesOf(d) {
		for _, r := range [][2]int64{{8192, 1}, {8191, 2}, {-1, 1}, {1 << 40, 512}} {
			if err := call(r[0], r[1]); !errors.Is(err, unix.EINVAL) {
				t.Errorf("%s, %d bytes at %d: got %v, want EINVAL", name, r[1], r[0], err)
			}
		}
		if err := call(8192, 0); err != nil {
			t.Errorf("%s, nothing: %v", name, err)
		}
	}
	if fi, err := os.Stat(path); err != nil || fi.Size() != 8192 {
		t.Errorf("the file has changed its size: %v, %v", fi.Size(), err)
	}
}

// Zeroes are written where there are none: holes of a file stay holes.
func TestZeroesKeepHoles(t *testing.T) {
	const size = 4 << 20
	path := filepath.Join(diskFolder(t), "sparse")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	d := openForWriting(t, path)
	data := bytes.Repeat([]byte{1}, 5000)
	if _, err := d.WriteAt(data, 1<<20+100); err != nil {
		t.Fatal(err)
	}
	if err := d.WriteZeroes(3, size-5, false, false); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(content, make([]byte, size)) {
		t.Errorf("not all zeroes (%v)", err)
	}
	if got := allocated(t, path); got > 128<<10 {
		t.Errorf("%d bytes are allocated, want no more than around the data", got)
	}
	if err := d.WriteZeroes(5, size-5, true, false); err != nil {
		t.Fatal(err)
	}
	if got := allocated(t, path); got < size-8192 {
		t.Errorf("%d bytes are allocated with NO_HOLE, want %d", got, size)
	}
}

// Methods with FUA do what those without do, at any alignment.
func TestFUA(t *testing.T) {
	for _, size := range []int{1 << 20, 1<<20 + 77} { // past the page cache, and through it
		path := newImage(t, diskFolder(t), size)
		d := openForWriting(t, path)
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		data := bytes.Repeat([]byte("0123456"), 100_000)
		for _, r := range [][2]int{{0, 4096}, {511, 2}, {5000, 300_000}, {size - 1, 1}} {
			off, n := r[0], r[1]
			if err := d.WriteFUA(data[:n], int64(off)); err != nil {
				t.Fatal(err)
			}
			copy(want[off:], data[:n])
			if off += n / 3; n > 2 {
				if err := d.WriteZeroesFUA(int64(off), int64(n/3), n&1 == 0, false); err != nil {
					t.Fatal(err)
				}
				clear(want[off : off+n/3])
			}
		}
		if err := d.TrimFUA(600_000, 100_000); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil || len(got) != size {
			t.Fatalf("the file has %d bytes, want %d (%v)", len(got), size, err)
		}
		copy(want[600_000:], got[600_000:700_000]) // not defined
		if !bytes.Equal(got, want) {
			t.Errorf("wrong content of the file of %d bytes", size)
		}
	}
}

func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func TestFastZero(t *testing.T) {
	path := newImage(t, t.TempDir(), 8192)
	d := openForWriting(t, path)
	before, _ := os.ReadFile(path)
	if err := d.WriteZeroes(0, 8192, false, true); !errors.Is(err, unix.ENOTSUP) {
		t.Errorf("got %v, want ENOTSUP", err)
	}
	if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
		t.Error("the content has changed")
	}
}

// A block device can be trimmed if sysfs says so.
func TestCanDiscard(t *testing.T) {
	for text, want := range map[string]bool{"0\n": false, "2199023255040\n": true, "": false} {
		for _, folder := range []string{"8:1/queue", "queue"} { // of a disk, and of a partition's disk
			root := t.TempDir()
			if err := os.MkdirAll(filepath.Join(root, "dev/block/8:1"), 0o700); err != nil {
				t.Fatal(err)
			}
			if text != "" {
				queue := filepath.Join(root, "dev/block", folder)
				if err := os.MkdirAll(queue, 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(queue, "discard_max_bytes"), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if got := canDiscard(unix.Mkdev(8, 1), Roots{Sys: root}); got != want {
				t.Errorf("%q in %s: got %t, want %t", text, folder, got, want)
			}
		}
	}
}

// A write does not begin if the device stands for another disk, and fails if that has happened
// meanwhile.
func TestWritesCheckTheBinding(t *testing.T) {
	calls := changesOf(nil)
	for name := range calls {
		for _, when := range []string{"before", "during"} {
			n := newNode(t, true, true)
			n.write(n.path, strings.Repeat("x", 4096))
			d, err := Open(t.Context(), n.path, Options{Roots: n.roots, Write: true})
			if err != nil {
				t.Fatal(err)
			}
			made := 0
			d.io = watched{d.io, func() {
				made++
				n.write(n.pid, "4712\n")
			}}
			if when == "before" {
				n.write(n.pid, "4712\n")
			}
			if err := changesOf(d)[name](0, 4096); !errors.Is(err, ErrReplaced) {
				t.Errorf("%s, replaced %s it: got %v, want ErrReplaced", name, when, err)
			}
			if when == "before" && made > 0 {
				t.Errorf("%s, replaced before it: %d calls have changed another disk", name, made)
			}
			if err := d.Flush(); !errors.Is(err, ErrReplaced) {
				t.Errorf("flush: got %v, want ErrReplaced", err)
			}
			d.Close()
		}
	}
}

// watched calls a function in each system call that changes the device.
type watched struct {
	storage
	inCall func()
}

func (w watched) pwrite(p []byte, off int64, durable bool) (int, error) {
	w.inCall()
	return w.storage.pwrite(p, off, durable)
}

func (w watched) discard(off, n int64) error {
	w.inCall()
	return w.storage.discard(off, n)
}

func (w watched) zero(off, n int64) error {
	w.inCall()
	return w.storage.zero(off, n)
}
