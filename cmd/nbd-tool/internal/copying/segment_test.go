package copying

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"xapi-nbd/cmd/nbd-tool/internal/extents"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

// volatile is a destination that crashes before some of its calls, and then loses the writes
// that were not flushed. As with a Pool, the call itself succeeds after a crash.
type volatile struct {
	End
	crashes []bool // before each call
	every   int    // after crashes: before each call of that number; 0 is never

	mu           sync.Mutex // guards the fields below, and crashes
	calls        int
	data, stable []byte
	losses       int64
	zeroed       int64
}

func (v *volatile) Name() string           { return "volatile" }
func (v *volatile) Size() int64            { return int64(len(v.data)) }
func (v *volatile) Unit() int64            { return 1 }
func (v *volatile) Lanes() int             { return 1 }
func (v *volatile) Extents() extents.Asker { return v.extents }

func (v *volatile) Losses() int64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.losses
}

// call does the work of a call, perhaps after a crash.
func (v *volatile) call(work func()) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.calls++
	crash := v.every > 0 && v.calls%v.every == 0
	if len(v.crashes) > 0 {
		crash, v.crashes = v.crashes[0], v.crashes[1:]
	}
	if crash {
		copy(v.data, v.stable)
		v.losses++
	}
	work()
	return nil
}

func (v *volatile) ReadAt(_ context.Context, p []byte, off int64) error {
	return v.call(func() { copy(p, v.data[off:]) })
}

func (v *volatile) WriteAt(_ context.Context, p []byte, off int64) error {
	return v.call(func() { copy(v.data[off:], p) })
}

func (v *volatile) Zero(_ context.Context, off, n int64) error {
	return v.call(func() { clear(v.data[off : off+n]); v.zeroed += n })
}

func (v *volatile) Flush(context.Context) error {
	return v.call(func() { copy(v.stable, v.data) })
}

func (v *volatile) extents(_ context.Context, off, n int64) (answer []wire.Extent, err error) {
	err = v.call(func() {
		for end := off + n; off < end; off += grain {
			e := wire.Extent{Length: uint64(min(grain, end-off))}
			if bytes.Count(v.data[off:off+int64(e.Length)], []byte{0}) == int(e.Length) {
				e.Status = wire.StateZero
			}
			answer = append(answer, e)
		}
	})
	return answer, err
}

// TestCopySurvivesCrashesOfTheDestination copies to destinations that crash at random: data that
// is reported as flushed is on stable storage, and at the end all of it.
func TestCopySurvivesCrashesOfTheDestination(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.IntRange(0, 6*chunkSize+777).Draw(t, "size")
		want := make([]byte, size)
		for off := 0; off < size; off += 16 * grain {
			if rapid.Bool().Draw(t, "data") {
				nbdtest.Fill(want[off:min(off+16*grain, size)], int64(off), 7)
			}
		}
		blank := rapid.Bool().Draw(t, "blank")
		old := make([]byte, size)
		if !blank {
			nbdtest.Fill(old, 3, 9)
		}
		dst := &volatile{data: slices.Clone(old), stable: slices.Clone(old)}
		dst.crashes = rapid.SliceOfN(rapid.Bool(), 0, 40).Draw(t, "crashes")
		upTo := int64(0)
		c := New(newFileEnd("src", nbdtest.NewRAM(want)), dst, Options{
			Requests: rapid.IntRange(1, 4).Draw(t, "requests"), Blank: blank,
			Segment: int64(rapid.IntRange(0, 3).Draw(t, "segment")) * chunkSize,
			Flushed: func(n int64) error {
				if n < upTo || !bytes.Equal(dst.stable[:n], want[:n]) {
					return fmt.Errorf("reported as flushed up to %d, after %d", n, upTo)
				}
				upTo = n
				return nil
			},
		})
		if err := c.Copy(t.Context()); err != nil {
			t.Fatal(err)
		}
		if upTo != int64(size) || !bytes.Equal(dst.stable, want) {
			t.Fatalf("flushed up to %d of %d; equal: %v", upTo, size, bytes.Equal(dst.stable, want))
		}
	})
}

// TestCopyWithFrequentLosses: a copy comes to its end although there is never time for a whole
// segment, and fails if there is not even time for one write.
func TestCopyWithFrequentLosses(t *testing.T) {
	const size = 64 * chunkSize
	want := nbdtest.Bytes(size, 0, 1)
	for every, fails := range map[int]bool{7: false, 1: true} {
		dst := &volatile{data: make([]byte, size), stable: make([]byte, size), every: every}
		err := New(newFileEnd("src", nbdtest.NewRAM(want)), dst, Options{Requests: 4, Segment: 16 * chunkSize}).Copy(t.Context())
		if fails != (err != nil) || fails && !strings.Contains(err.Error(), "volatile: connections are lost too often: 20 times while the range at offset 0") {
			t.Errorf("a loss before each call %d: got error %v", every, err)
		}
		if !fails && !bytes.Equal(dst.stable, want) {
			t.Errorf("a loss before each call %d: wrong data", every)
		}
	}
}

// TestCopyGoesOn copies the second half only.
func TestCopyGoesOn(t *testing.T) {
	const size = 8 * chunkSize
	want, old := nbdtest.Bytes(size, 0, 1), nbdtest.Bytes(size, 0, 2)
	dst := &volatile{data: slices.Clone(old), stable: slices.Clone(old)}
	counted := int64(0)
	c := New(newFileEnd("src", nbdtest.NewRAM(want)), dst, Options{
		Requests: 1, From: size / 2, Count: func(n int64) { counted += n },
	})
	if n, err := c.DataBytes(t.Context()); err != nil || n != size/2 {
		t.Errorf("%d bytes to read, error %v", n, err)
	}
	if err := c.Copy(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(dst.stable[:size/2], old[:size/2]) || !bytes.Equal(dst.stable[size/2:], want[size/2:]) || counted != size/2 {
		t.Errorf("not the second half, or %d bytes counted", counted)
	}
}

// TestCopyZeroesOnlyWhereNeeded: ranges that are zero at both ends are not written.
func TestCopyZeroesOnlyWhereNeeded(t *testing.T) {
	const size = 64 * grain
	dst := &volatile{data: make([]byte, size), stable: make([]byte, size)}
	nbdtest.Fill(dst.data[8*grain:12*grain], 0, 1)
	c := New(newFileEnd("src", nbdtest.NewRAM(make([]byte, size))), dst, Options{Requests: 1})
	if err := c.Copy(t.Context()); err != nil {
		t.Fatal(err)
	}
	if dst.zeroed != 4*grain || !bytes.Equal(dst.stable, make([]byte, size)) {
		t.Errorf("%d bytes were zeroed, want %d", dst.zeroed, 4*grain)
	}
}

// TestCopyEndsWithAnError: errors of either end, of Flushed and of the context end the copy
// without a goroutine left.
func TestCopyEndsWithAnError(t *testing.T) {
	const size = 20 * chunkSize
	broken := errors.New("broken")
	full := func() *nbdtest.FaultyRAM { return nbdtest.NewFaultyRAM(nbdtest.NewRAM(nbdtest.Bytes(size, 0, 1))) }
	for name, breakIt := range map[string]func(src, dst *nbdtest.FaultyRAM, o *Options) error{
		"read":  func(src, _ *nbdtest.FaultyRAM, _ *Options) error { src.Fail(size/2, 1, broken); return broken },
		"write": func(_, dst *nbdtest.FaultyRAM, _ *Options) error { dst.Fail(size/2, 1, broken); return broken },
		"flush": func(_, dst *nbdtest.FaultyRAM, _ *Options) error { dst.FailFlush(broken); return broken },
		"flushed": func(_, _ *nbdtest.FaultyRAM, o *Options) error {
			o.Flushed = func(int64) error { return broken }
			return broken
		},
	} {
		src, dst := full(), full()
		o := Options{Requests: 3, Segment: 2 * chunkSize}
		want := breakIt(src, dst, &o)
		if err := New(newFileEnd("src", src), newFileEnd("dst", dst), o).Copy(t.Context()); !errors.Is(err, want) {
			t.Errorf("%s: got error %v, want %v", name, err, want)
		}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	o := Options{Requests: 3, Segment: 2 * chunkSize, Flushed: func(int64) error { cancel(broken); return nil }}
	if err := New(newFileEnd("src", full()), newFileEnd("dst", full()), o).Copy(ctx); !errors.Is(err, broken) {
		t.Errorf("cancelled: got error %v", err)
	}
}

// TestRateLimit: after the first chunk, the limit says how long each one takes.
func TestRateLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 11 * chunkSize
		c := New(newFileEnd("src", nbdtest.NewMem(size, 1)), newFileEnd("dst", nbdtest.NewRAM(make([]byte, size))),
			Options{Requests: 4, Rate: RateLimit(chunkSize)})
		begin := time.Now()
		if err := c.Copy(t.Context()); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begin).Round(time.Second); took != 10*time.Second {
			t.Errorf("took %v, want 10s", took)
		}
	})
}

// TestZeroLooksFirst: on a device that cannot free storage, only bytes that are not zero are
// zeroed.
func TestZeroLooksFirst(t *testing.T) {
	const size = 5*chunkSize + 777
	content := make([]byte, size)
	content[chunkSize+5], content[size-1] = 1, 1
	ram := nbdtest.NewRAM(content)
	f := newFileEnd("device", ram)
	f.look = true
	if err := f.Zero(t.Context(), 0, size); err != nil {
		t.Fatal(err)
	}
	if calls := ram.Calls(); calls.Zeroes != 2 || !bytes.Equal(ram.Content(), make([]byte, size)) {
		t.Errorf("%d zeroings, want 2", calls.Zeroes)
	}
}
