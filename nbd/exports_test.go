package nbd_test

import (
	"errors"
	"io"
	"syscall"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
)

// The server finds the capabilities of a device by its type. Each of these types has a part
// of the methods of a RAM; their content is that of the other exports.

// writableOnly can be written and nothing else.
type writableOnly struct {
	nbd.Device
	io.WriterAt
}

// sparseOnly knows its holes and cannot be written.
type sparseOnly struct {
	nbd.Device
	nbd.Extenter
}

// cachedOnly can be cached and cannot be written.
type cachedOnly struct {
	nbd.Device
	nbd.Cacher
}

// sealed can do everything but be written.
type sealed struct {
	nbd.Device
	nbd.Flusher
	nbd.Trimmer
	nbd.ZeroWriter
	nbd.MultiConner
}

// worn can be written, flushed and trimmed, if that works.
type worn struct {
	nbd.Device
	io.WriterAt
	nbd.Flusher
	nbd.Trimmer
}

// sparse is the rows with holes: two blocks of 4 KiB, a single sector, and the
// last 4 KiB.
func sparse(content []byte) []byte {
	clear(content[0x1000:0x3000])
	clear(content[0x4000:0x4200])
	clear(content[0xf000:])
	return content
}

// addWritable adds the exports that need a RAM.
func (e *rowsExports) addWritable() {
	open := func(content func() []byte, change func(*nbdtest.RAM) nbd.Device) func() (nbd.Device, error) {
		return func() (nbd.Device, error) {
			r := nbdtest.NewRAM(content())
			r.Min, r.Preferred, r.MaxPayload = 512, 4096, 32<<20
			e.mu.Lock()
			e.mems = append(e.mems, &r.Mem)
			e.mu.Unlock()
			return change(r), nil
		}
	}
	e.Exports["ram"] = open(rows, func(r *nbdtest.RAM) nbd.Device { return r })
	e.Exports["slow"] = open(rows, func(r *nbdtest.RAM) nbd.Device {
		r.SlowZeroes = true
		return r
	})
	e.Exports["writable"] = open(rows, func(r *nbdtest.RAM) nbd.Device { return writableOnly{r, r} })
	e.Exports["sparse"] = open(func() []byte { return sparse(rows()) }, func(r *nbdtest.RAM) nbd.Device { return sparseOnly{r, r} })
	e.Exports["cached"] = open(rows, func(r *nbdtest.RAM) nbd.Device { return cachedOnly{r, r} })
	e.Exports["sealed"] = open(rows, func(r *nbdtest.RAM) nbd.Device { return sealed{r, r, r, r, r} })
	e.Exports["worn"] = open(rows, func(r *nbdtest.RAM) nbd.Device {
		f := nbdtest.NewFaultyRAM(r)
		f.Fail(0x8000, 512, errors.New("medium error"))
		f.Fail(0x9000, 512, syscall.ENOSPC)
		f.Fail(0xa000, 512, syscall.EACCES)
		f.FailFlush(errors.New("cache is gone"))
		return worn{f, f, f, f}
	})
}
