package nbdfile

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/test/requires"
)

func TestFilesAreDevices(t *testing.T) {
	for _, size := range []int{0, 1, 511, 512, 4097, 9<<20 + 17} {
		content := nbdtest.Bytes(size, 0, 1)
		clear(content[size/3 : size/2])
		path := makeFile(t, content)
		for _, opts := range []Options{{ReadOnly: true}, {}} {
			nbdtest.TestDevice(t, func() nbd.Device { return open(t, path, opts) })
			if got := contentOf(t, path); !bytes.Equal(got, content) {
				t.Errorf("size %d, %+v: the file was left with other content", size, opts)
			}
		}
	}
	path := makeSparse(t, 3<<20, [2]int64{0, 4096}, [2]int64{1 << 20, 1<<20 + 65536})
	nbdtest.TestDevice(t, func() nbd.Device { return open(t, path, Options{}) })
}

func TestBlockDevicesAreDevices(t *testing.T) {
	for _, sector := range []string{"512", "4096"} {
		t.Run(sector, func(t *testing.T) {
			content := nbdtest.Bytes(3<<20, 0, 1)
			path := requires.Loop(t, makeFile(t, content), "--sector-size", sector)
			for _, opts := range []Options{{ReadOnly: true}, {}} {
				nbdtest.TestDevice(t, func() nbd.Device { return open(t, path, opts) })
			}
			if got := contentOf(t, path); !bytes.Equal(got, content) {
				t.Error("the device was left with other content")
			}
		})
	}
}

// TestCapabilities: a value has the methods that hold for its file, and no
// others.
func TestCapabilities(t *testing.T) {
	file := func(t *testing.T) string { return makeFile(t, make([]byte, 4096)) }
	block := func(t *testing.T) string { return requires.Loop(t, makeFile(t, make([]byte, 1<<20))) }
	tests := []struct {
		name            string
		path            func(t *testing.T) string
		opts            Options
		writes, extents bool
	}{
		{"file to read", file, Options{ReadOnly: true}, false, true},
		{"file to write", file, Options{}, true, true},
		{"block device to read", block, Options{ReadOnly: true}, false, false},
		{"block device to write", block, Options{}, true, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := open(t, tt.path(t), tt.opts)
			defer d.Close()
			has := make(map[string]bool)
			_, has["BlockSizer"] = d.(nbd.BlockSizer)
			_, has["Cacher"] = d.(nbd.Cacher)
			_, has["MultiConner"] = d.(nbd.MultiConner)
			_, has["WriterAt"] = d.(io.WriterAt)
			_, has["Flusher"] = d.(nbd.Flusher)
			_, has["Trimmer"] = d.(nbd.Trimmer)
			_, has["ZeroWriter"] = d.(nbd.ZeroWriter)
			_, has["Extenter"] = d.(nbd.Extenter)
			for name, got := range has {
				want := tt.writes
				switch name {
				case "BlockSizer", "Cacher", "MultiConner":
					want = true
				case "Extenter":
					want = tt.extents
				}
				if got != want {
					t.Errorf("%s: got %v, want %v", name, got, want)
				}
			}
			if m, ok := d.(nbd.MultiConner); !ok || !m.MultiConn() {
				t.Error("MultiConn: got false, want true")
			}
		})
	}
}

func TestBlockSizes(t *testing.T) {
	expect := func(path string, want uint32) {
		t.Helper()
		d := open(t, path, Options{ReadOnly: true})
		defer d.Close()
		if got, _, _ := d.(nbd.BlockSizer).BlockSizes(); got != want {
			t.Errorf("minimum block size: got %d, want %d", got, want)
		}
	}
	for _, size := range []int{0, 1, 511, 512, 513, 1 << 20} {
		expect(makeFile(t, make([]byte, size)), 1)
	}
	expect(requires.Loop(t, makeFile(t, make([]byte, 1<<20))), 512)
	expect(requires.Loop(t, makeFile(t, make([]byte, 1<<20)), "--sector-size", "4096"), 4096)
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, kind := range map[string]string{dir: "a folder", os.DevNull: "a character device", fifo: "a named pipe"} {
		for _, opts := range []Options{{}, {ReadOnly: true}} {
			if d, err := Open(path, opts); err == nil {
				t.Errorf("%s: got a device of %d bytes, want an error", path, d.Size())
			} else if !strings.HasSuffix(err.Error(), " but "+kind) {
				t.Errorf("%s: got error %v, want it to say that this is %s", path, err, kind)
			}
		}
	}
	if _, err := Open(filepath.Join(dir, "missing"), Options{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: got error %v, want os.ErrNotExist", err)
	}
}

// TestReadOnlyBlockDevice: the kernel opens it for writing, and refuses each
// write then; who asks for a device to write learns it at once.
func TestReadOnlyBlockDevice(t *testing.T) {
	path := requires.Loop(t, makeFile(t, make([]byte, 1<<20)), "--read-only")
	if _, err := Open(path, Options{}); !errors.Is(err, unix.EROFS) && !errors.Is(err, unix.EACCES) {
		t.Errorf("for writing: got error %v, want EROFS", err)
	}
	open(t, path, Options{ReadOnly: true}).Close()
}

func TestCache(t *testing.T) {
	d := openForTest(t, makeSparse(t, 1<<40))
	for _, r := range [][2]int64{{0, 0}, {0, 1 << 40}, {1, 4095}, {1 << 40, 0}} {
		if err := d.Cache(r[0], r[1]); err != nil {
			t.Errorf("%d bytes at %d: got error %v, want none", r[1], r[0], err)
		}
	}
}

// TestInside checks that requests outside the device are refused, and the file keeps its
// size.
func TestInside(t *testing.T) {
	path := makeFile(t, nbdtest.Bytes(1000, 0, 1))
	d := openForTest(t, path)
	for _, r := range [][2]int64{{-1, 1}, {0, 1001}, {1000, 1}, {1001, 0}, {0, -1}, {1<<63 - 1, 1<<63 - 1}} {
		off, n := r[0], r[1]
		for name, call := range map[string]func() error{
			"Trim":        func() error { return d.Trim(off, n) },
			"WriteZeroes": func() error { return d.WriteZeroes(off, n, false, false) },
			"Cache":       func() error { return d.Cache(off, n) },
			"Extents":     func() error { _, err := d.(nbd.Extenter).Extents(off, n); return err },
			"WriteAt": func() error {
				_, err := d.WriteAt(make([]byte, min(max(n, 0), 2000)), off)
				if n < 0 || n == 0 && off > 1000 {
					return unix.EINVAL // cannot be asked
				}
				return err
			},
		} {
			if err := call(); !errors.Is(err, unix.EINVAL) {
				t.Errorf("%s of %d bytes at %d: got error %v, want EINVAL", name, n, off, err)
			}
		}
	}
	if got := contentOf(t, path); !bytes.Equal(got, nbdtest.Bytes(1000, 0, 1)) {
		t.Errorf("the file has changed; it has %d bytes", len(got))
	}
}

// TestDescription: every kind of device has the description that it was opened with.
func TestDescription(t *testing.T) {
	path := makeFile(t, make([]byte, 512))
	for _, opts := range []Options{{}, {Description: "a disk"}, {ReadOnly: true, Description: "a disk"}} {
		d := open(t, path, opts)
		t.Cleanup(func() { d.Close() })
		if x, ok := d.(nbd.Describer); !ok || x.Description() != opts.Description {
			t.Errorf("%+v: not described so", opts)
		}
	}
}
