package copying

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"

	"xapi-nbd/cmd/nbd-tool/internal/extents"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

// liar is a source whose extents are all zero.
type liar struct{ End }

func (liar) Extents() extents.Asker {
	return func(_ context.Context, _, n int64) ([]wire.Extent, error) {
		return []wire.Extent{{Length: uint64(n), Status: wire.StateZero}}, nil
	}
}

// The extents of the source are verified too.
func TestVerifyBelievesNoExtents(t *testing.T) {
	src := newFileEnd("src", nbdtest.NewMem(1<<20, 1))
	ram := nbdtest.NewRAM(make([]byte, 1<<20))
	c := New(liar{src}, newFileEnd("dst", ram), Options{Requests: 2, Blank: true})
	if err := c.Copy(t.Context()); err != nil || ram.Calls().Writes != 0 {
		t.Fatalf("copy: error %v, %d writes; want to be deceived", err, ram.Calls().Writes)
	}
	if err := c.Verify(t.Context()); err == nil || !strings.Contains(err.Error(), "dst differs from the source at offset ") {
		t.Errorf("verify: got error %v", err)
	}
}

// counting counts the bytes that are read.
type counting struct {
	End
	read *atomic.Int64
}

func (c counting) ReadAt(ctx context.Context, p []byte, off int64) error {
	c.read.Add(int64(len(p)))
	return c.End.ReadAt(ctx, p, off)
}

// TestVerifyComparesWhatWasCopied compares the changed blocks, those that are known to be
// zero too, and no others.
func TestVerifyComparesWhatWasCopied(t *testing.T) {
	const unit, size = 64 << 10, 16 << 16
	now := nbdtest.Bytes(size, 0, 1)
	clear(now[10*unit : 11*unit])
	var read atomic.Int64
	src, ram := newFileEnd("src", nbdtest.NewRAM(now)), nbdtest.NewRAM(now)
	states := map[int64]uint64{3: 0, 4: 0, 10: extents.StateZeroNow}
	changes := &Changes{
		ask: func(_ context.Context, off, _ int64) ([]wire.Extent, error) {
			state, changed := states[off/unit]
			if !changed {
				state = extents.StateUnchanged
			}
			return []wire.Extent{{Length: uint64(unit - off%unit), Status: state}}, nil
		},
		kindOf: func(state uint64) taskKind {
			return map[uint64]taskKind{0: copyData, extents.StateUnchanged: leaveAsIs, extents.StateZeroNow: makeZero}[state]
		},
	}
	c := New(counting{src, &read}, newFileEnd("dst", ram), Options{Requests: 1, Changes: changes})
	if _, err := ram.WriteAt([]byte{^now[11*unit]}, 11*unit); err != nil { // not in a changed block
		t.Fatal(err)
	}
	if err := c.Verify(t.Context()); err != nil {
		t.Errorf("the same content: %v", err)
	}
	if n, err := c.VerifyBytes(t.Context()); err != nil || n != 3*unit || read.Load() != n {
		t.Errorf("%d bytes were compared and %d announced, error %v; want %d", read.Load(), n, err, 3*unit)
	}
	if _, err := ram.WriteAt([]byte{1}, 10*unit+77); err != nil {
		t.Fatal(err)
	}
	if err := c.Verify(t.Context()); err == nil || !strings.Contains(err.Error(), "differs from the source at offset 655437") {
		t.Errorf("a byte that should be zero: got %v", err)
	}
}
