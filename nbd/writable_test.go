package nbd

import (
	"bytes"
	"fmt"
	"sync"
)

// writableDevice is a device in memory that records all calls besides reads. It is only a
// Writer; capableDevice has the other interfaces.
type writableDevice struct {
	*fakeDevice
	before func(what string) error // called first; an error is the answer

	memMu sync.Mutex
	data  []byte
	diary []string
}

// newWritable returns a device of zeroes.
func newWritable(size int64) *writableDevice {
	d := &writableDevice{fakeDevice: newDevice(size), data: make([]byte, size)}
	d.onRead = func(p []byte, off int64) (int, error) {
		d.memMu.Lock()
		defer d.memMu.Unlock()
		return copy(p, d.data[off:]), nil
	}
	return d
}

// note records a call and executes it.
func (d *writableDevice) note(do func(), format string, args ...any) error {
	what := fmt.Sprintf(format, args...)
	if d.before != nil {
		if err := d.before(what); err != nil {
			return err
		}
	}
	d.memMu.Lock()
	defer d.memMu.Unlock()
	d.diary = append(d.diary, what)
	if do != nil {
		do()
	}
	return nil
}

// took returns the recorded calls, and clears them.
func (d *writableDevice) took() []string {
	d.memMu.Lock()
	defer d.memMu.Unlock()
	diary := d.diary
	d.diary = nil
	return diary
}

func (d *writableDevice) content() []byte {
	d.memMu.Lock()
	defer d.memMu.Unlock()
	return bytes.Clone(d.data)
}

func (d *writableDevice) WriteAt(p []byte, off int64) (int, error) {
	d.count(+1, p, off)
	defer d.count(-1, p, off)
	if err := d.note(func() { copy(d.data[off:], p) }, "write %d+%d", off, len(p)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// capableDevice is a writableDevice with all capabilities.
type capableDevice struct{ *writableDevice }

func (d capableDevice) Flush() error { return d.note(nil, "flush") }

func (d capableDevice) Trim(off, n int64) error {
	return d.note(func() { clear(d.data[off : off+n]) }, "trim %d+%d", off, n)
}

func (d capableDevice) WriteZeroes(off, n int64, noHole, fast bool) error {
	return d.note(func() { clear(d.data[off : off+n]) }, "zero %d+%d %v %v", off, n, noHole, fast)
}

func (d capableDevice) Cache(off, n int64) error { return d.note(nil, "cache %d+%d", off, n) }

func (d capableDevice) MultiConn() bool { return true }

// throughDevice is a device with WritesThrough.
type throughDevice struct {
	*writableDevice
	through bool
}

func (d throughDevice) WritesThrough() bool { return d.through }
