package nbdtest_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

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
