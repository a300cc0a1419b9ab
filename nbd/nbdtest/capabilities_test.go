package nbdtest_test

import (
	"errors"
	"strings"
	"sync/atomic"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

// oddRAM is a writable device that does one thing wrong.
type oddRAM struct {
	*nbdtest.RAM
	write   func(r *nbdtest.RAM, p []byte, off int64) (int, error)
	flush   func() error
	trim    func(r *nbdtest.RAM, off, n int64) error
	zero    func(r *nbdtest.RAM, off, n int64, noHole, fast bool) error
	cache   func(r *nbdtest.RAM, off, n int64) error
	extents func(r *nbdtest.RAM, off, n int64) ([]wire.Extent, error)
}

func (d oddRAM) WriteAt(p []byte, off int64) (int, error) {
	if d.write == nil {
		return d.RAM.WriteAt(p, off)
	}
	return d.write(d.RAM, p, off)
}

func (d oddRAM) Flush() error {
	if d.flush == nil {
		return d.RAM.Flush()
	}
	return d.flush()
}

func (d oddRAM) Trim(off, n int64) error {
	if d.trim == nil {
		return d.RAM.Trim(off, n)
	}
	return d.trim(d.RAM, off, n)
}

func (d oddRAM) WriteZeroes(off, n int64, noHole, fast bool) error {
	if d.zero == nil {
		return d.RAM.WriteZeroes(off, n, noHole, fast)
	}
	return d.zero(d.RAM, off, n, noHole, fast)
}

func (d oddRAM) Cache(off, n int64) error {
	if d.cache == nil {
		return d.RAM.Cache(off, n)
	}
	return d.cache(d.RAM, off, n)
}

func (d oddRAM) Extents(off, n int64) ([]wire.Extent, error) {
	if d.extents == nil {
		return d.RAM.Extents(off, n)
	}
	return d.extents(d.RAM, off, n)
}

// changed returns the extents of r after f changed the first one.
func changed(f func(e *wire.Extent)) func(*nbdtest.RAM, int64, int64) ([]wire.Extent, error) {
	return func(r *nbdtest.RAM, off, n int64) ([]wire.Extent, error) {
		extents, err := r.Extents(off, n)
		f(&extents[0])
		return extents, err
	}
}

var oddRAMs = []struct {
	name string
	odd  oddRAM
	want string
}{
	{"loses writes", oddRAM{write: func(_ *nbdtest.RAM, p []byte, _ int64) (int, error) { return len(p), nil }}, "content differs"},
	{"rounds writes down", oddRAM{write: func(r *nbdtest.RAM, p []byte, off int64) (int, error) { return r.WriteAt(p, off&^511) }}, "content differs"},
	{"stops short", oddRAM{write: func(r *nbdtest.RAM, p []byte, off int64) (int, error) { return r.WriteAt(p[:min(len(p), 4096)], off) }}, "want all"},
	{"says nothing at the end", oddRAM{write: func(r *nbdtest.RAM, p []byte, off int64) (int, error) {
		_, err := r.WriteAt(p[:min(int64(len(p)), r.Size()-off)], off)
		return len(p), err
	}}, "before the end: got"},
	{"does not flush", oddRAM{flush: func() error { return errors.New("full") }}, "Flush: got error full"},
	{"trims neighbours", oddRAM{trim: func(r *nbdtest.RAM, off, n int64) error {
		return r.Trim(off&^511, min((n+1023)&^511, r.Size()-off&^511))
	}}, "trimmed: read"},
	{"fails to trim", oddRAM{trim: func(*nbdtest.RAM, int64, int64) error { return wire.ENOTSUP }}, "trim 1 bytes"},
	{"does not zero", oddRAM{zero: func(*nbdtest.RAM, int64, int64, bool, bool) error { return nil }}, "zeroed: read"},
	{"zeroes neighbours", oddRAM{zero: func(r *nbdtest.RAM, off, n int64, noHole, fast bool) error {
		return r.WriteZeroes(off, min(n+1, r.Size()-off), noHole, fast)
	}}, "zeroed: read"},
	{"never zeroes", oddRAM{zero: func(*nbdtest.RAM, int64, int64, bool, bool) error { return wire.ENOTSUP }}, "fast false: got error"},
	{"zeroes although it says no", oddRAM{zero: func(r *nbdtest.RAM, off, n int64, noHole, fast bool) error {
		err := r.WriteZeroes(off, n, noHole, fast)
		if fast && err == nil {
			err = wire.ENOTSUP
		}
		return err
	}}, "zeroed: read"},
	{"fails to cache", oddRAM{cache: func(*nbdtest.RAM, int64, int64) error { return wire.EIO }}, "cache"},
	{"spoils what it caches", oddRAM{cache: func(r *nbdtest.RAM, off, n int64) error { return r.WriteZeroes(off, n, true, true) }}, "after caching"},
	{"calls data zeroes", oddRAM{extents: changed(func(e *wire.Extent) { e.Status = wire.StateZero })}, "are said to be zeroes"},
	{"has an empty extent", oddRAM{extents: changed(func(e *wire.Extent) { e.Length = 0 })}, "has 0 bytes"},
	{"has an extent past the end", oddRAM{extents: changed(func(e *wire.Extent) { e.Length += 1 << 40 })}, "are left"},
	{"has an unknown status", oddRAM{extents: changed(func(e *wire.Extent) { e.Status = 4 })}, "unknown status"},
	{"has no extents", oddRAM{extents: func(*nbdtest.RAM, int64, int64) ([]wire.Extent, error) { return nil, nil }}, "want some"},
	{"knows no extents", oddRAM{extents: func(*nbdtest.RAM, int64, int64) ([]wire.Extent, error) { return nil, wire.EIO }}, "NBD_EIO"},
	{"has too many extents", oddRAM{extents: func(r *nbdtest.RAM, off, n int64) ([]wire.Extent, error) {
		return r.Extents(off, r.Size()-off)
	}}, "behind the range"},
}

// TestTestDeviceCapabilities shows the suite writable devices that it must not
// let pass.
func TestTestDeviceCapabilities(t *testing.T) {
	for _, tt := range oddRAMs {
		t.Run(tt.name, func(t *testing.T) {
			got := failuresOf(t, func(t testing.TB) {
				r := nbdtest.NewRAM(sparse(80_000))
				nbdtest.TestDevice(t, func() nbd.Device {
					d := tt.odd
					d.RAM = r.Again()
					return d
				})
			})
			if !strings.Contains(got, tt.want) {
				t.Errorf("got failures %.500q, want one with %q", got, tt.want)
			}
		})
	}
}

// TestTestDeviceCoherence: devices that say MultiConn are the same storage.
func TestTestDeviceCoherence(t *testing.T) {
	got := failuresOf(t, func(t testing.TB) {
		nbdtest.TestDevice(t, func() nbd.Device { return nbdtest.NewRAM(sparse(100_000)) })
	})
	if !strings.Contains(got, "another device") {
		t.Errorf("got failures %.500q, want some about another device", got)
	}
}

// onlyReads hides everything else; its way to write is not to be used.
type onlyReads struct {
	nbd.Device
	writes *atomic.Int64
}

func (d onlyReads) Info() wire.ExportInfo {
	return wire.ExportInfo{Flags: wire.FlagHasFlags | wire.FlagReadOnly}
}

func (d onlyReads) WriteAt([]byte, int64) (int, error) {
	d.writes.Add(1)
	return 0, errors.New("read-only")
}

// TestTestDeviceReadOnlyExport: a client's connection to a read-only export has
// a method to write all the same.
func TestTestDeviceReadOnlyExport(t *testing.T) {
	var writes atomic.Int64
	nbdtest.TestDevice(t, func() nbd.Device { return onlyReads{nbdtest.NewMem(10_000, 1), &writes} })
	if got := writes.Load(); got != 0 {
		t.Errorf("got %d writes to a read-only export, want none", got)
	}
}
