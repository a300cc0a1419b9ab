package main

import (
	"bytes"
	"fmt"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
)

// corrupting changes one byte of the data written at an offset.
type corrupting struct {
	*nbdtest.RAM
	at int64
}

func (c corrupting) WriteAt(p []byte, off int64) (int, error) {
	if i := c.at - off; i >= 0 && i < int64(len(p)) {
		p = bytes.Clone(p)
		p[i] ^= 1
	}
	return c.RAM.WriteAt(p, off)
}

// forgetful reports success for WriteZeroes and does nothing.
type forgetful struct{ *nbdtest.RAM }

func (forgetful) WriteZeroes(int64, int64, bool, bool) error { return nil }

func TestVerifyNotices(t *testing.T) {
	want := make([]byte, 2<<20)
	nbdtest.Fill(want[1<<20:], 0, 1)
	src := sparseFile(t, want)
	tests := []struct {
		name string
		open func(*nbdtest.RAM) nbd.Device
		want string
	}{
		{"data", func(r *nbdtest.RAM) nbd.Device { return corrupting{r, 1<<20 + 77777} }, fmt.Sprint("offset ", 1<<20+77777)},
		{"zeroes", func(r *nbdtest.RAM) nbd.Device { return forgetful{r} }, "offset "},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ram := nbdtest.NewRAM(bytes.Repeat([]byte{1}, len(want)))
			dst := serveOne(t, func() nbd.Device { return tt.open(ram.Again()) })
			succeed(t, "copy", src, dst) // does not look
			fail(t, exitFailed, []string{"verification: nbd://127.0.0.1:", " differs from the source at " + tt.want},
				"copy", "--verify", src, dst)
		})
	}
}
