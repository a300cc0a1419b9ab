package mirror

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"
)

var errInjected = errors.New("injected error")

// simDevice is a disk in memory with a volatile cache, whose operations are held until the
// test carries them out. It reports misuse.
type simDevice struct {
	t     *testing.T
	name  string
	rng   *rand.Rand
	block int64
	free  bool // operations are not held

	mu            sync.Mutex
	data, durable []byte // with and without the cache
	losses        int64
	pending       []*simOp
	dead          bool // all operations fail: the process that used the device is gone
	changes       int  // changes that arrived
}

// simOp is an operation of a simDevice that has not returned.
type simOp struct {
	dev     *simDevice
	command string
	off, n  int64
	p       []byte // the caller's: to be filled, or written
	applied bool
	done    chan error
}

func (o *simOp) String() string { return fmt.Sprintf("%s %s %d+%d", o.dev.name, o.command, o.off, o.n) }

func newSimDevice(t *testing.T, name string, rng *rand.Rand, block int64, data []byte) *simDevice {
	return &simDevice{t: t, name: name, rng: rng, block: block, data: bytes.Clone(data), durable: bytes.Clone(data)}
}

func (d *simDevice) Size() int64      { return int64(len(d.data)) }
func (d *simDevice) BlockSize() int64 { return d.block }

func (d *simDevice) Losses() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.losses
}

func (d *simDevice) ReadAt(ctx context.Context, p []byte, off int64) error {
	return d.do(ctx, "read", p, off, int64(len(p)))
}

func (d *simDevice) WriteAt(ctx context.Context, p []byte, off int64) error {
	return d.do(ctx, "write", p, off, int64(len(p)))
}

func (d *simDevice) WriteZeroes(ctx context.Context, off, n int64) error {
	return d.do(ctx, "zero", nil, off, n)
}

func (d *simDevice) Trim(ctx context.Context, off, n int64) error {
	return d.do(ctx, "trim", nil, off, n)
}

func (d *simDevice) Flush(ctx context.Context) error { return d.do(ctx, "flush", nil, 0, 0) }

// Extents tells the truth about the content now.
func (d *simDevice) Extents(_ context.Context, off, n int64) ([]Extent, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var extents []Extent
	for i := off; i < off+n; i++ {
		zero := d.data[i] == 0
		if last := len(extents) - 1; last >= 0 && extents[last].Zero == zero {
			extents[last].Length++
		} else {
			extents = append(extents, Extent{1, zero})
		}
	}
	return extents, nil
}

// do makes an operation arrive, and waits until it has ended.
func (d *simDevice) do(ctx context.Context, command string, p []byte, off, n int64) error {
	o := &simOp{dev: d, command: command, off: off, n: n, p: p, done: make(chan error, 1)}
	d.mu.Lock()
	if end := off + n; off < 0 || end > d.Size() || off%d.block != 0 || end%d.block != 0 && end != d.Size() || n == 0 && command != "flush" {
		d.t.Errorf("misuse: %v", o)
	}
	if o.changes() {
		d.changes++
	}
	switch {
	case d.dead:
		d.mu.Unlock()
		return errInjected
	case d.free:
		d.apply(o)
		d.mu.Unlock()
		return nil
	}
	d.pending = append(d.pending, o)
	d.mu.Unlock()
	select {
	case err := <-o.done:
		return err
	case <-ctx.Done():
		d.mu.Lock()
		defer d.mu.Unlock()
		d.remove(o)
		return context.Cause(ctx)
	}
}

func (o *simOp) changes() bool { return o.command != "read" && o.command != "flush" }

// apply carries an operation out. The caller holds d.mu.
func (d *simDevice) apply(o *simOp) {
	o.applied = true
	switch o.command {
	case "read":
		copy(o.p, d.data[o.off:])
	case "write":
		copy(d.data[o.off:], o.p)
	case "zero":
		clear(d.data[o.off : o.off+o.n])
	case "trim":
		for i := range o.n {
			d.data[o.off+i] = byte(d.rng.Uint32())
		}
	case "flush":
		copy(d.durable, d.data)
	}
}

func (d *simDevice) remove(o *simOp) {
	d.pending = slices.DeleteFunc(d.pending, func(p *simOp) bool { return p == o })
}

// carryOut applies a pending operation, without letting it return.
func (d *simDevice) carryOut(o *simOp) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.apply(o)
}

// finish lets an operation return; with an error a change has been carried out in part, and a
// flush has lost a part of the cache.
func (d *simDevice) finish(o *simOp, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case err != nil && o.command == "write":
		n := d.rng.Int64N(o.n + 1)
		copy(d.data[o.off:], o.p[:n])
	case err != nil && o.command == "flush":
		d.drop()
	case err == nil && !o.applied:
		d.apply(o)
	}
	d.remove(o)
	o.done <- err
}

// drop loses a part of the cache. The caller holds d.mu.
func (d *simDevice) drop() {
	all := d.rng.IntN(2) == 0
	for i := 0; i < len(d.data); i += 8 {
		if end := min(i+8, len(d.data)); all || d.rng.IntN(2) == 0 {
			copy(d.data[i:end], d.durable[i:end])
		}
	}
}

// lose makes the device lose a part of its cache and go on. Of the operations in flight some
// are carried out again, others have been acknowledged before.
func (d *simDevice) lose() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.drop()
	d.losses++
	for _, o := range d.pending {
		if o.applied && d.rng.IntN(2) == 0 {
			o.applied = false
		}
	}
}

// kill ends the use of the device by a process: operations in flight may be carried out or
// not. With power the cache is lost too.
func (d *simDevice) kill(power bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dead = true
	for _, o := range d.pending {
		if !o.applied && d.rng.IntN(2) == 0 {
			d.apply(o)
		}
		o.done <- errInjected
	}
	d.pending = nil
	if power {
		d.drop()
		copy(d.durable, d.data)
	}
}

// successor returns the device as another process finds it.
func (d *simDevice) successor(name string) *simDevice {
	s := newSimDevice(d.t, name, d.rng, d.block, d.data)
	s.durable = bytes.Clone(d.durable)
	return s
}

// simIntent is a write-intent log. Its Marks are held like operations of a device.
type simIntent struct {
	disk   *simDevice // of one byte per region, 1 if the bit is set
	region int64

	mu    sync.Mutex
	marks []int // without Done
	done  []time.Time
	ended bool
}

func newSimIntent(t *testing.T, rng *rand.Rand, size, region int64) *simIntent {
	n := (size + region - 1) / region
	return &simIntent{
		disk:   newSimDevice(t, "log", rng, 1, bytes.Repeat([]byte{1}, int(n))),
		region: region, marks: make([]int, n), done: make([]time.Time, n),
	}
}

func (l *simIntent) Mark(ctx context.Context, off, n int64) error {
	first, behind := off/l.region, (off+n-1)/l.region+1
	l.mu.Lock()
	for i := first; i < behind; i++ {
		l.marks[i]++
	}
	l.mu.Unlock()
	l.disk.mu.Lock()
	set := !bytes.Contains(l.disk.data[first:behind], []byte{0})
	l.disk.mu.Unlock()
	if set {
		return nil
	}
	err := l.disk.WriteAt(ctx, bytes.Repeat([]byte{1}, int(behind-first)), first)
	if err != nil {
		l.Done(off, n)
	}
	return err
}

func (l *simIntent) Done(off, n int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := off / l.region; i*l.region < off+n; i++ {
		l.marks[i]--
		l.done[i] = time.Now()
	}
}

func (l *simIntent) Clear(_ context.Context, began time.Time, clean func(off, n int64) bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, marks := range l.marks {
		off := int64(i) * l.region
		if marks == 0 && l.done[i].Before(began) && clean(off, l.region) {
			l.disk.mu.Lock()
			l.disk.data[i] = 0
			l.disk.mu.Unlock()
		}
	}
	return nil
}

func (l *simIntent) Complete(context.Context, bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, marks := range l.marks {
		if marks != 0 {
			return fmt.Errorf("region %d has a Mark without Done", i)
		}
	}
	l.ended = true
	return nil
}

// dirty yields the regions whose bits are set.
func (l *simIntent) dirty(size int64) func(yield func(off, n int64) bool) {
	return func(yield func(off, n int64) bool) {
		for i, set := range l.disk.data {
			off := int64(i) * l.region
			if set == 1 && !yield(off, min(l.region, size-off)) {
				return
			}
		}
	}
}
