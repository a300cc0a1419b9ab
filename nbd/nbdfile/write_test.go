package nbdfile

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"golang.org/x/sys/unix"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
	"xapi-nbd/test/requires"
)

// TestHoles: trimming and zeroing give storage back, unless it is to stay.
func TestHoles(t *testing.T) {
	const size = 1 << 20
	path := makeFile(t, nbdtest.Bytes(size, 0, 1))
	d := openForTest(t, path)
	blocks := func() int64 {
		t.Helper()
		var st unix.Stat_t
		if err := errors.Join(d.Flush(), unix.Stat(path, &st)); err != nil {
			t.Fatal(err)
		}
		return st.Blocks * 512
	}
	full := blocks()
	err := d.WriteZeroes(0, size/4, false, true)
	knowsHoles := !errors.Is(err, wire.ENOTSUP) // of the file system
	if !knowsHoles {
		err = d.WriteZeroes(0, size/2, false, false)
	}
	if err := errors.Join(err, d.Trim(size/4, size/4)); err != nil {
		t.Fatal(err)
	}
	if got := blocks(); knowsHoles && got > full-size/2 {
		t.Errorf("got %d bytes of storage after half was given back, want %d", got, full-size/2)
	}
	before := blocks()
	if err := d.WriteZeroes(size/2, size/2, true, false); err != nil {
		t.Fatal(err)
	}
	if got := blocks(); got < before {
		t.Errorf("got %d bytes of storage after zeroing without a hole, want %d as before", got, before)
	}
	if got := contentOf(t, path); !bytes.Equal(got, make([]byte, size)) {
		t.Error("the file does not hold zeroes only")
	}
}

// fake returns the system calls of d, to replace them.
func fake(t *testing.T, d nbd.Device) *writer {
	t.Helper()
	switch d := d.(type) {
	case writeFile:
		return d.writer
	case writeBlock:
		return d.writer
	}
	t.Fatalf("%T is not to be written", d)
	return nil
}

// TestWithoutFallocate has a file system without fallocate: zeroes are written, or the call
// fails if it has to be fast.
func TestWithoutFallocate(t *testing.T) {
	const size = 3<<20 + 512
	tests := []struct {
		name   string
		modes  map[uint32]error // nil: done by the kernel; missing: not asked for
		noHole bool
		fast   bool
		want   error
	}{
		{"nothing", map[uint32]error{punchHole: unix.EOPNOTSUPP, zeroRange: unix.EOPNOTSUPP}, false, false, nil},
		{"nothing, fast", map[uint32]error{punchHole: unix.EOPNOTSUPP, zeroRange: unix.ENOSYS}, false, true, wire.ENOTSUP},
		{"nothing, no hole", map[uint32]error{zeroRange: unix.EOPNOTSUPP}, true, false, nil},
		{"nothing, no hole, fast", map[uint32]error{zeroRange: unix.EOPNOTSUPP}, true, true, wire.ENOTSUP},
		{"full disk", map[uint32]error{zeroRange: unix.ENOSPC}, true, false, unix.ENOSPC},
		{"broken disk", map[uint32]error{punchHole: unix.EIO}, false, true, unix.EIO},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			content := nbdtest.Bytes(size, 0, 1)
			path := makeFile(t, content)
			d := openForTest(t, path)
			fake(t, d).fallocate = func(_ int, mode uint32, off, n int64) error {
				err, asked := tt.modes[mode]
				if !asked || off != 100 || n != size-200 {
					return fmt.Errorf("unexpected mode %#x, %d bytes at %d", mode, n, off)
				}
				return err
			}
			if err := d.WriteZeroes(100, size-200, tt.noHole, tt.fast); !errors.Is(err, tt.want) {
				t.Fatalf("got error %v, want %v", err, tt.want)
			}
			if tt.want == nil {
				clear(content[100 : size-100])
			}
			if !bytes.Equal(contentOf(t, path), content) {
				t.Error("wrong content")
			}
		})
	}
}

func TestTrimMayDoNothing(t *testing.T) {
	content := nbdtest.Bytes(4096, 0, 1)
	path := makeFile(t, content)
	d := openForTest(t, path)
	for given, want := range map[error]error{unix.EOPNOTSUPP: nil, unix.ENOSYS: nil, unix.EIO: unix.EIO} {
		calls := 0
		fake(t, d).fallocate = func(int, uint32, int64, int64) error {
			if calls++; calls == 1 {
				return unix.EINTR
			}
			return given
		}
		if err := d.Trim(0, 4096); !errors.Is(err, want) {
			t.Errorf("%v: got error %v, want %v", given, err, want)
		}
		if calls != 2 {
			t.Errorf("%v: got %d calls, want another one after a signal", given, calls)
		}
	}
	if !bytes.Equal(contentOf(t, path), content) {
		t.Error("the content has changed")
	}
}

// TestFlushFailsForever: Linux reports lost writes once and then forgets them;
// that the next flush works does not bring them back.
func TestFlushFailsForever(t *testing.T) {
	d := openForTest(t, makeFile(t, make([]byte, 512)))
	results := []error{nil, unix.EINTR, nil, unix.EIO, nil, unix.ENOSPC}
	fake(t, d).sync = func(int) error {
		err := results[0]
		results = results[1:]
		return err
	}
	for i, want := range []error{nil, nil, unix.EIO, unix.EIO, unix.EIO} {
		if err := d.Flush(); !errors.Is(err, want) {
			t.Errorf("flush %d: got error %v, want %v", i, err, want)
		}
	}
}

// A flush that overlaps one that fails does not succeed, although the kernel reports the loss
// once.
func TestOverlappingFlushes(t *testing.T) {
	d := openForTest(t, makeFile(t, make([]byte, 512)))
	synctest.Test(t, func(t *testing.T) {
		var calls atomic.Int32
		first, results := make(chan error), make(chan error, 2)
		fake(t, d).sync = func(int) error {
			if calls.Add(1) == 1 {
				return <-first
			}
			return nil
		}
		for range cap(results) {
			go func() { results <- d.Flush() }()
			synctest.Wait()
		}
		first <- unix.EIO
		for range cap(results) {
			if err := <-results; !errors.Is(err, unix.EIO) {
				t.Errorf("got %v, want EIO", err)
			}
		}
	})
}

// TestBlockZeroUnaligned: the kernel zeroes whole sectors, the rest is written.
func TestBlockZeroUnaligned(t *testing.T) {
	const size, sector = 1 << 20, 4096
	image := makeFile(t, nbdtest.Bytes(size, 0, 1))
	path := requires.Loop(t, image, "--sector-size", "4096")
	d := openForTest(t, path)
	content := nbdtest.Bytes(size, 0, 1)
	w := fake(t, d)
	kernel := w.fallocate
	var asked []int64
	w.fallocate = func(fd int, mode uint32, off, n int64) error {
		asked = append(asked, off, off+n)
		return kernel(fd, mode, off, n)
	}
	for _, tt := range []struct {
		off, n   int64
		from, to int64 // range of the system call
	}{
		{0, 2 * sector, 0, 2 * sector},
		{10 * sector, 2*sector + 1, 10 * sector, 12 * sector},
		{20*sector - 1, 3 * sector, 20 * sector, 22 * sector},
		{30*sector + 1, 2*sector - 2, 0, 0},
		{40*sector + 1, sector - 2, 0, 0},
	} {
		asked = nil
		fast := d.WriteZeroes(tt.off, tt.n, false, true)
		if asked != nil || (tt.to > 0) != errors.Is(fast, wire.ENOTSUP) {
			t.Errorf("%d bytes at %d, fast: got error %v, asked the kernel for %v", tt.n, tt.off, fast, asked)
		}
		if fast != nil && !bytes.Equal(contentOf(t, path), content) {
			t.Errorf("%d bytes at %d: refused and changed", tt.n, tt.off)
		}
		if err := d.WriteZeroes(tt.off, tt.n, false, false); err != nil {
			t.Errorf("%d bytes at %d: got error %v, want none", tt.n, tt.off, err)
		}
		// More than once if the device cannot give storage back.
		if tt.to > 0 && (len(asked) < 2 || asked[0] != tt.from || asked[1] != tt.to) || tt.to == 0 && asked != nil {
			t.Errorf("%d bytes at %d: asked the kernel for %v, want %d to %d", tt.n, tt.off, asked, tt.from, tt.to)
		}
		clear(content[tt.off : tt.off+tt.n])
		if !bytes.Equal(contentOf(t, path), content) {
			t.Errorf("%d bytes at %d: wrong content", tt.n, tt.off)
		}
	}
	if err := d.Flush(); err != nil {
		t.Error(err)
	}
	if got, err := os.ReadFile(image); err != nil || !bytes.Equal(got, content) {
		t.Errorf("the file behind the device differs (%v)", err)
	}
}

// TestFastZeroKeepsCachedWrites: the kernel zeroes the cached pages before it
// learns that a device cannot zero fast, as a loop device on a file of tmpfs
// cannot after it was asked to zero without a hole.
func TestFastZeroKeepsCachedWrites(t *testing.T) {
	const size = 1 << 20
	image := makeFile(t, make([]byte, size))
	if f, err := os.CreateTemp("/dev/shm", "xapi-nbd-test-"); err == nil {
		t.Cleanup(func() { os.Remove(f.Name()) })
		if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
			t.Fatal(err)
		}
		image = f.Name()
	}
	d := openForTest(t, requires.Loop(t, image))
	if err := d.WriteZeroes(0, 4096, true, false); err != nil {
		t.Fatal(err)
	}
	for seed := range uint64(3) {
		want := nbdtest.Bytes(65536, 0, seed)
		if _, err := d.WriteAt(want, 0); err != nil {
			t.Fatal(err)
		}
		zeroed := d.WriteZeroes(512, 32768, false, true)
		if zeroed == nil {
			clear(want[512 : 512+32768])
		} else if !errors.Is(zeroed, wire.ENOTSUP) {
			t.Fatal(zeroed)
		}
		got := make([]byte, len(want))
		if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("round %d: got wrong content (%v) after zeroing fast said %v", seed, err, zeroed)
		}
	}
}
