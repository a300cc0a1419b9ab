package blockdev

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/nbdtest"
)

// writeModel is the model of a disk that clients write: the results of reads, and the content
// after a loss of power.
type writeModel struct {
	now, durable contents
	changes      []change // since durable, in the order in which they ended
}

// contents are the bytes of a disk. Those that are not known may have any value.
type contents struct{ data, unknown []byte }

func newContents(data []byte) contents {
	return contents{bytes.Clone(data), make([]byte, len(data))}
}

// change is a change of a range of the disk.
type change struct {
	off, n  int64
	data    []byte // nil: not known, because of a trim or an error
	durable bool   // when it ended
}

func (c *contents) apply(x change) {
	copy(c.data[x.off:], x.data)
	fill := byte(0)
	if x.data == nil {
		fill = 1
	}
	for i := range c.unknown[x.off : x.off+x.n] {
		c.unknown[x.off+int64(i)] = fill
	}
}

// flushed makes the first n changes durable.
func (m *writeModel) flushed(n int) {
	for _, c := range m.changes[:n] {
		m.durable.apply(c)
	}
	m.changes = slices.Delete(m.changes, 0, n)
}

// mismatch returns the first byte from begin to end that a read must not return; -1 if there is
// none.
func (m *writeModel) mismatch(got []byte, begin int64) int64 {
	end := begin + int64(len(got))
	if bytes.Equal(got, m.now.data[begin:end]) {
		return -1
	}
	for i := begin; i < end; i++ {
		if got[i-begin] != m.now.data[i] && m.now.unknown[i] == 0 {
			return i
		}
	}
	return -1
}

// lost returns the first byte that a disk must not have after a loss of power; -1 if there is
// none.
func (m *writeModel) lost(got []byte) int64 {
	allowed := make([]bool, len(got))
	for i := range got {
		allowed[i] = got[i] == m.durable.data[i] || m.durable.unknown[i] != 0
	}
	for _, c := range m.changes {
		for i := c.off; i < c.off+c.n; i++ {
			is := c.data == nil || got[i] == c.data[i-c.off]
			allowed[i] = is || allowed[i] && !c.durable
		}
	}
	return int64(slices.Index(allowed, false))
}

// writeRun drives a model and a Device on a fault disk behind the NBD server.
type writeRun struct {
	t       *testing.T
	rng     *rand.Rand
	disk    *faultDisk
	dev     *Device
	process *faultProcess
	model   writeModel
	server  *nbd.Server
	conns   [2]*client.Conn
	ends    [2]func() error
	// flushFailed is true when a flush has failed in this process: all further ones must.
	flushFailed bool
	steps       int
}

const modelSize = 512 << 10

func newWriteRun(t *testing.T, seed uint64) *writeRun {
	r := &writeRun{t: t, rng: rand.New(rand.NewPCG(seed, 0))}
	r.disk = newFaultDisk(rand.New(rand.NewPCG(seed, 1)), modelSize)
	if seed%3 == 0 {
		r.disk.failing = 0.01
	}
	r.model = writeModel{now: newContents(r.disk.data), durable: newContents(r.disk.data)}
	r.server = &nbd.Server{Exporter: nbd.ExporterFunc(func(context.Context, nbd.Peer, string) (nbd.Device, error) {
		return export{r.dev}, nil
	})}
	r.start()
	return r
}

// start opens the disk, as another process, and connects.
func (r *writeRun) start() {
	r.t.Helper()
	r.dev, r.process = r.disk.open()
	r.flushFailed = false
	for i := range r.conns {
		nc, end := nbdtest.Pipe(r.t, r.server)
		c, err := client.New(r.t.Context(), nc, &client.Config{})
		if err != nil {
			r.t.Fatal(err)
		}
		if r.conns[i], err = c.Go(r.t.Context(), ""); err != nil {
			r.t.Fatal(err)
		}
		r.ends[i] = end
	}
}

// stop disconnects.
func (r *writeRun) stop() {
	for i, c := range r.conns {
		c.Close()
		r.ends[i]()
	}
}

// operation is a request of a client, and its result.
type operation struct {
	name    string
	change  change // n is 0 for a flush and a read
	do      func(ctx context.Context, c *client.Conn) error
	flushes bool
	reads   []byte // where the bytes of a read are
	off     int64  // of a read
	waits   bool   // it must not succeed while changes of the disk are held
	err     error
}

// length returns a length of a request: few are long.
func (r *writeRun) length() int64 {
	switch r.rng.IntN(20) {
	case 0:
		return 1 + r.rng.Int64N(300<<10)
	case 1, 2, 3:
		return 1 + r.rng.Int64N(70<<10)
	case 4, 5, 6, 7, 8, 9:
		return faultBlock * (1 + r.rng.Int64N(20))
	}
	return 1 + r.rng.Int64N(1500)
}

// batch returns requests that do not overlap, although many have blocks in common.
func (r *writeRun) batch() []*operation {
	var ops []*operation
	off := r.rng.Int64N(modelSize)
	for range 1 + r.rng.IntN(6) {
		if r.rng.IntN(2) == 0 {
			off += r.rng.Int64N(2000)
		}
		if r.rng.IntN(2) == 0 {
			off &^= faultBlock - 1
			if len(ops) > 0 {
				off += faultBlock
			}
		}
		n := min(r.length(), modelSize-off)
		if n <= 0 {
			break
		}
		ops = append(ops, r.operation(off, n))
		off += n
	}
	return ops
}

func (r *writeRun) operation(off, n int64) *operation {
	fua := r.rng.IntN(3) == 0
	o := &operation{change: change{off: off, n: n, durable: fua}}
	switch kind := r.rng.IntN(10); kind {
	case 0, 1, 2, 3:
		data := nbdtest.Bytes(int(n), off, r.rng.Uint64())
		o.name, o.waits, o.change.data = fmt.Sprintf("write, FUA %t", fua), true, data
		o.do = func(ctx context.Context, c *client.Conn) error { return c.Write(ctx, data, off, fua) }
	case 4, 5:
		z := client.ZeroOptions{NoHole: kind == 4, FUA: fua}
		o.name, o.waits, o.change.data = fmt.Sprintf("zeroes %+v", z), z.NoHole || fua, make([]byte, n)
		o.do = func(ctx context.Context, c *client.Conn) error { return c.WriteZeroes(ctx, off, n, z) }
	case 6:
		o.name, o.waits = fmt.Sprintf("trim, FUA %t", fua), fua
		o.do = func(ctx context.Context, c *client.Conn) error { return c.Trim(ctx, off, n, fua) }
	case 7, 8:
		o.name, o.waits, o.flushes, o.change = "flush", true, true, change{}
		o.do = func(ctx context.Context, c *client.Conn) error { return c.Flush(ctx) }
	default:
		o.name, o.change, o.reads, o.off = "read", change{}, make([]byte, n), off
		o.do = func(ctx context.Context, c *client.Conn) error { return c.Read(ctx, o.reads, off) }
	}
	return o
}

// step makes the requests of a batch at the same time, and may kill the process meanwhile.
func (r *writeRun) step(killed bool) {
	ops := r.batch()
	held := killed || r.rng.IntN(4) == 0
	if held {
		r.process.hold()
	}
	ends, left := make(chan *operation, len(ops)), len(ops)
	for _, o := range ops {
		c := r.conns[r.rng.IntN(len(r.conns))]
		go func() {
			o.err = o.do(r.t.Context(), c)
			ends <- o
		}()
	}
	if held {
		synctest.Wait()
		for ; len(ends) > 0; left-- {
			if o := <-ends; o.waits && o.err == nil {
				r.t.Errorf("step %d: %s: acknowledged before the disk has done it", r.steps, o.name)
			}
		}
		if killed {
			r.process.kill()
		} else {
			r.process.release()
		}
	}
	for ; left > 0; left-- {
		<-ends
	}
	r.ended(ops)
	r.steps += len(ops)
}

// ended updates the model with the results of a batch.
func (r *writeRun) ended(ops []*operation) {
	before := len(r.model.changes)
	flushed := false
	for _, o := range ops {
		if o.err != nil && r.disk.failing == 0 && !r.process.killed {
			r.t.Errorf("step %d: %s: %v", r.steps, o.name, o.err)
		}
		switch {
		case o.flushes && o.err == nil:
			flushed = true
			if r.flushFailed {
				r.t.Errorf("step %d: a flush has succeeded after another one failed", r.steps)
			}
		case o.reads != nil && o.err == nil:
			if at := r.model.mismatch(o.reads, o.off); at >= 0 {
				r.t.Errorf("step %d: read of %d bytes at %d: wrong byte at %d", r.steps, len(o.reads), o.off, at)
			}
		case o.change.n > 0:
			if o.err != nil {
				o.change.data, o.change.durable = nil, false
			}
			r.model.now.apply(o.change)
			r.model.changes = append(r.model.changes, o.change)
		}
	}
	for _, o := range ops {
		r.flushFailed = r.flushFailed || o.flushes && o.err != nil
	}
	if flushed {
		r.model.flushed(before)
	}
}

// compare looks at the whole disk.
func (r *writeRun) compare(when string) {
	r.t.Helper()
	if at := r.model.mismatch(r.disk.content(), 0); at >= 0 {
		r.t.Fatalf("step %d, %s: wrong byte at %d", r.steps, when, at)
	}
}

// crash kills the process in the middle of a batch, and half of the time the power is lost too.
func (r *writeRun) crash() {
	r.t.Helper()
	r.step(true)
	r.stop()
	if r.rng.IntN(2) == 0 {
		r.compare("after the process was killed")
	} else {
		r.disk.losePower()
		got := r.disk.content()
		if at := r.model.lost(got); at >= 0 {
			r.t.Fatalf("step %d: after a loss of power: the byte at %d is older than what was flushed or had FUA, or was never written", r.steps, at)
		}
		r.model = writeModel{now: newContents(got), durable: newContents(got)}
	}
	r.start()
}

// TestWriteModel: acknowledged writes are read, writes that were flushed or had FUA survive a
// loss of power, and nothing else changes: 12,000 random requests through the NBD server,
// several at a time, to a disk with a write cache.
func TestWriteModel(t *testing.T) {
	seeds, steps := uint64(24), 500
	if testing.Short() {
		seeds = 4
	}
	for seed := range seeds {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newWriteRun(t, seed)
				for batch := 1; r.steps < steps && !t.Failed(); batch++ {
					switch {
					case r.rng.IntN(12) == 0:
						r.crash()
					default:
						r.step(false)
					}
					if batch%8 == 0 {
						r.compare("between requests")
					}
				}
				r.stop()
				r.compare("at the end")
			})
		})
	}
}
