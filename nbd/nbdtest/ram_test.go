package nbdtest_test

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

// sparse is content with holes in the middle and at the end.
func sparse(size int) []byte {
	p := nbdtest.Bytes(size, 0, 1)
	clear(p[size/3 : size/2])
	clear(p[size-size/10:])
	return p
}

func TestRAMIsADevice(t *testing.T) {
	for _, size := range []int{0, 1, 511, 512, 4097, 1 << 20, 9<<20 + 17} {
		r := nbdtest.NewRAM(sparse(size))
		var opened []*nbdtest.RAM
		nbdtest.TestDevice(t, func() nbd.Device {
			opened = append(opened, r.Again())
			return opened[len(opened)-1]
		})
		if got := r.Content(); !bytes.Equal(got, sparse(size)) || !bytes.Equal(got, r.Stable()) {
			t.Errorf("size %d: the suite left other content than it found", size)
		}
		for i, r := range opened {
			if r.Closes() != 1 {
				t.Errorf("size %d: device %d was closed %d times, want once", size, i, r.Closes())
			}
		}
	}
}

func TestRAMVariants(t *testing.T) {
	slow := nbdtest.NewRAM(sparse(300_000))
	slow.SlowZeroes = true
	nbdtest.TestDevice(t, func() nbd.Device { return slow.Again() })
	healthy := nbdtest.NewRAM(sparse(300_000))
	nbdtest.TestDevice(t, func() nbd.Device { return nbdtest.NewFaultyRAM(healthy.Again()) })
}

// TestRAMStable: only a flush makes changes survive.
func TestRAMStable(t *testing.T) {
	r := nbdtest.NewRAM([]byte("0123456789"))
	change := func(want string) {
		t.Helper()
		before := r.Stable()
		if got := string(r.Content()); got != want {
			t.Errorf("content: got %q, want %q", got, want)
		}
		if err := r.Flush(); err != nil {
			t.Fatal(err)
		}
		if got := string(r.Stable()); got != want || string(before) == want {
			t.Errorf("stable: got %q before the flush and %q after, want %q after", before, got, want)
		}
	}
	if n, err := r.WriteAt([]byte("abc"), 2); n != 3 || err != nil {
		t.Fatalf("WriteAt: got %d and error %v", n, err)
	}
	change("01abc56789")
	if err := r.WriteZeroes(3, 4, false, false); err != nil {
		t.Fatal(err)
	}
	change("01a\x00\x00\x00\x00789")
	if err := r.Trim(0, 10); err != nil {
		t.Fatal(err)
	}
	change(strings.Repeat("\x00", 10))
	want := nbdtest.RAMCalls{Writes: 1, Flushes: 3, Trims: 1, Zeroes: 1}
	if diff := cmp.Diff(want, r.Calls()); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
	if again := r.Again(); again.Calls() != (nbdtest.RAMCalls{}) || !bytes.Equal(again.Content(), r.Content()) {
		t.Error("another device of the storage has other content, or calls of this one")
	}
}

// TestRAMExtents compares the extents after each kind of change.
func TestRAMExtents(t *testing.T) {
	const data, zero, hole = 0, wire.StateZero, wire.StateZero | wire.StateHole
	content := make([]byte, 4096+100)
	copy(content[1024:], nbdtest.Bytes(1024, 0, 1))
	r := nbdtest.NewRAM(content)
	expect := func(what string, off, n int64, want ...wire.Extent) {
		t.Helper()
		got, err := r.Extents(off, n)
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Errorf("%s: got error %v and (-want +got):\n%s", what, err, diff)
		}
	}
	size := r.Size()
	expect("new", 0, size, wire.Extent{Length: 1024, Status: hole}, wire.Extent{Length: 1024, Status: data}, wire.Extent{Length: 2148, Status: hole})
	expect("inside", 1000, 30, wire.Extent{Length: 24, Status: hole}, wire.Extent{Length: 6, Status: data})
	_, _ = r.WriteAt([]byte("x"), 4096)
	expect("written", 2048, size-2048, wire.Extent{Length: 2048, Status: hole}, wire.Extent{Length: 100, Status: data})
	_ = r.WriteZeroes(100, 1000, true, false)
	expect("zeroed", 0, 1536, wire.Extent{Length: 512, Status: hole}, wire.Extent{Length: 512, Status: zero}, wire.Extent{Length: 512, Status: data})
	_ = r.Trim(1024, size-1024)
	expect("trimmed", 512, size-512, wire.Extent{Length: 512, Status: zero}, wire.Extent{Length: size64(size - 1024), Status: hole})
}

func size64(n int64) uint64 { return uint64(n) }

func TestRAMMisuse(t *testing.T) {
	calls := map[string]func(r *nbdtest.RAM, off, n int64) error{
		"WriteAt": func(r *nbdtest.RAM, off, n int64) error {
			_, err := r.WriteAt(make([]byte, n), off)
			return err
		},
		"Trim":        func(r *nbdtest.RAM, off, n int64) error { return r.Trim(off, n) },
		"WriteZeroes": func(r *nbdtest.RAM, off, n int64) error { return r.WriteZeroes(off, n, true, false) },
		"Cache":       func(r *nbdtest.RAM, off, n int64) error { return r.Cache(off, n) },
		"Extents": func(r *nbdtest.RAM, off, n int64) error {
			_, err := r.Extents(off, n)
			return err
		},
	}
	for name, call := range calls {
		for _, at := range [][2]int64{{-1, 1}, {0, 513}, {512, 1}, {513, 0}, {1 << 62, 1}} {
			r := nbdtest.NewRAM(make([]byte, 512))
			err, misuse := call(r, at[0], at[1]), r.Misuse()
			if !errors.Is(err, wire.EINVAL) || misuse == nil || !strings.Contains(misuse.Error(), name) {
				t.Errorf("%s of %d bytes at %d: got error %v and misuse %v, want NBD_EINVAL and one", name, at[1], at[0], err, misuse)
			}
		}
		r := nbdtest.NewRAM(make([]byte, 512))
		if err := call(r, 0, 512); err != nil || r.Misuse() != nil {
			t.Errorf("%s: got error %v and misuse %v, want none", name, err, r.Misuse())
		}
		r.Close()
		if err := call(r, 0, 1); !errors.Is(err, nbdtest.ErrClosed) || r.Misuse() == nil {
			t.Errorf("%s after Close: got error %v and misuse %v", name, err, r.Misuse())
		}
	}
}

func TestFaultyRAM(t *testing.T) {
	errBad := errors.New("bad")
	r := nbdtest.NewRAM(nbdtest.Bytes(4096, 0, 1))
	f := nbdtest.NewFaultyRAM(r)
	f.Fail(1024, 1, errBad)
	if n, err := f.WriteAt(make([]byte, 2048), 512); n != 512 || !errors.Is(err, errBad) {
		t.Errorf("WriteAt: got %d and error %v, want 512 and that", n, err)
	}
	if n, err := f.ReadAt(make([]byte, 2048), 1024); n != 0 || !errors.Is(err, errBad) {
		t.Errorf("ReadAt: got %d and error %v, want 0 and that", n, err)
	}
	for name, err := range map[string]error{
		"Trim": f.Trim(1000, 100), "WriteZeroes": f.WriteZeroes(0, 4096, false, true), "Cache": f.Cache(1024, 1),
	} {
		if !errors.Is(err, errBad) {
			t.Errorf("%s: got error %v, want that", name, err)
		}
	}
	if extents, err := f.Extents(0, 4096); extents != nil || !errors.Is(err, errBad) {
		t.Errorf("Extents: got %v and error %v, want none and that", extents, err)
	}
	want := nbdtest.Bytes(4096, 0, 1)
	clear(want[:1024])
	if !bytes.Equal(r.Content(), want) {
		t.Error("what is before the fault was not written, or what is behind it was")
	}

	f.FailFlush(io.ErrShortWrite)
	if err := f.Flush(); !errors.Is(err, io.ErrShortWrite) || r.Calls().Flushes != 0 {
		t.Errorf("Flush: got error %v and %d flushes, want that and none", err, r.Calls().Flushes)
	}
	f.FailFlush(nil)
	f.Heal()
	if err := errors.Join(f.Flush(), f.Trim(1000, 100), f.WriteZeroes(0, 4096, false, true)); err != nil || r.Calls().Flushes != 1 {
		t.Errorf("healed: got error %v and %d flushes, want none and one", err, r.Calls().Flushes)
	}
}

func TestFaultyRAMHold(t *testing.T) {
	r := nbdtest.NewRAM(make([]byte, 4096))
	f := nbdtest.NewFaultyRAM(r)
	arrived, release := f.Hold()
	done := make(chan error)
	calls := []func() error{f.Flush, func() error { return f.Trim(0, 1) }, func() error {
		_, err := f.WriteAt([]byte("x"), 0)
		return err
	}}
	for _, call := range calls {
		go func() { done <- call() }()
		<-arrived
	}
	if got := r.Calls(); got != (nbdtest.RAMCalls{}) {
		t.Errorf("got calls %+v while they are held", got)
	}
	release()
	for range calls {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}
