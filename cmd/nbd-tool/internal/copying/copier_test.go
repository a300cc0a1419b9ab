package copying

import (
	"errors"
	"io"
	"runtime"
	"testing"

	"xapi-nbd/nbd/nbdtest"
)

// manyLanes is an end with as many connections as there can be.
type manyLanes struct{ End }

func (manyLanes) Lanes() int { return 64 }

// The memory of a copy does not grow with the number of requests that the user allows.
func TestCopyMemoryIsBounded(t *testing.T) {
	const slack = 16 << 20 // goroutines, tasks
	const size = 8 << 20
	file := func() End { return manyLanes{newFileEnd("end", nbdtest.NewRAM(make([]byte, size)))} }
	allocated := func(do func(c *Copier) error) uint64 {
		c := New(file(), file(), Options{Requests: 256})
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		if err := do(c); err != nil {
			t.Fatal(err)
		}
		runtime.ReadMemStats(&after)
		return after.TotalAlloc - before.TotalAlloc
	}
	for name, do := range map[string]func(c *Copier) error{
		"copy":            func(c *Copier) error { return c.Copy(t.Context()) },
		"copy and verify": func(c *Copier) error { return errors.Join(c.Copy(t.Context()), c.Verify(t.Context())) },
		"stream":          func(c *Copier) error { return c.Stream(t.Context(), io.Discard) },
	} {
		if got := allocated(do); got > maxBuffers+slack {
			t.Errorf("%s: %d MiB allocated, want at most %d", name, got>>20, (maxBuffers+slack)>>20)
		}
	}
	// Usual numbers are not restricted.
	c := New(&fileEnd{}, nil, Options{Requests: 64})
	if got := c.workers(2); got != 64 {
		t.Errorf("%d requests in flight, want 64", got)
	}
}
