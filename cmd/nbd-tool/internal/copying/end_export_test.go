package copying

import (
	"bytes"
	"context"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

// exportOf returns a device as an export.
func exportOf(t *testing.T, d nbd.Device) *Export {
	t.Helper()
	pool, err := client.NewPool(t.Context(), client.PoolConfig{Open: func(ctx context.Context) (*client.Conn, error) {
		nc, _ := nbdtest.Pipe(t, &nbd.Server{Exporter: nbdtest.Single("a", d)})
		c, err := client.New(ctx, nc, nil)
		if err != nil {
			return nil, err
		}
		return c.Go(ctx, "a")
	}})
	if err != nil {
		t.Fatal(err)
	}
	e := NewExport(pool, "export", func(error) string { return "" })
	t.Cleanup(func() { e.Close() })
	return e
}

// zeroer is a device whose WriteZeroes fails with an error if the range is longer than so many
// bytes.
type zeroer struct {
	*nbdtest.RAM
	longest int64
	err     error
}

func (z zeroer) WriteZeroes(off, n int64, noHole, fast bool) error {
	if n > z.longest {
		return z.err
	}
	return z.RAM.WriteZeroes(off, n, noHole, fast)
}

// TestZeroOfAnExport: a range that WRITE_ZEROES cannot zero is written, and the next one is zeroed
// again.
func TestZeroOfAnExport(t *testing.T) {
	const size = 64 << 10
	for _, tt := range []struct {
		name           string
		longest        int64
		err            error
		off, n         int64 // of the first range; the second one is the last block
		zeroes, writes int
	}{
		{"whole blocks", size, nil, 512, 1024, 2, 0},
		{"an end inside a block", size, nil, 0, 1000, 2, 1},
		{"less than a block", size, nil, 0, 100, 1, 1},
		{"the end of the export", size, nil, size - 1024, 1024, 2, 0},
		{"too long", 512, wire.EINVAL, 0, 1024, 1, 1},
		{"too long for its type", 512, wire.EOVERFLOW, 0, 1024, 1, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ram := nbdtest.NewRAM(bytes.Repeat([]byte{1}, size))
			ram.Min = 512
			e := exportOf(t, zeroer{ram, tt.longest, tt.err})
			want := ram.Content()
			for _, at := range [][2]int64{{tt.off, tt.n}, {size - 512, 512}} {
				if err := e.Zero(t.Context(), at[0], at[1]); err != nil {
					t.Fatal(err)
				}
				clear(want[at[0] : at[0]+at[1]])
			}
			if !bytes.Equal(ram.Content(), want) {
				t.Error("wrong content")
			}
			if calls := ram.Calls(); calls.Zeroes != tt.zeroes || calls.Writes != tt.writes {
				t.Errorf("%d zeroings and %d writes, want %d and %d", calls.Zeroes, calls.Writes, tt.zeroes, tt.writes)
			}
		})
	}
}

// TestZeroFails: errors other than refusals are errors of the copy.
func TestZeroFails(t *testing.T) {
	e := exportOf(t, zeroer{nbdtest.NewRAM(make([]byte, 4096)), 0, wire.ENOSPC})
	if err := e.Zero(t.Context(), 0, 4096); err == nil {
		t.Error("got no error")
	}
}
