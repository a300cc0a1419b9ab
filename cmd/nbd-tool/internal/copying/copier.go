package copying

import (
	"bytes"
	"context"
	"fmt"

	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"xapi-nbd/cmd/nbd-tool/internal/extents"
)

const (
	// chunkSize is the length of a request: long enough for little overhead per byte,
	// short enough for many requests in flight in little memory.
	chunkSize = 256 << 10
	// zeroSize is the largest range that one request zeroes: the server may have to write
	// it, and progress is counted per request.
	zeroSize = 64 << 20
	// grain is the smallest range of zeroes that is zeroed instead of written.
	grain = 4096
	// maxBuffers bounds the memory of all requests in flight, of all connections.
	maxBuffers = 256 << 20
)

var zeroes = make([]byte, chunkSize)

// Options are the parameters of a copy.
type Options struct {
	Requests int      // requests in flight for each connection of the end that has most
	Changes  *Changes // nil: all of the source is copied
	Blank    bool     // the destination is known to read as zeroes from From on
	From     int64    // everything before is copied already; the end of a segment, or 0

	// Segment is about how many bytes are written between two flushes; 0: the
	// destination is flushed only at the end.
	Segment int64
	// Flushed is called when everything before an offset has been copied and flushed.
	// It may be nil. An error ends the copy.
	Flushed func(upTo int64) error
	// Count is called with the number of bytes of each task that reads from the source,
	// when it is done; not again if the task is repeated. It may be nil.
	Count func(n int64)
	// Rate limits the bytes that are read per second; nil is no limit.
	Rate *rate.Limiter
}

// Copier copies one end to another, or compares them. Its methods must not be called
// concurrently.
type Copier struct {
	src, dst End
	opts     Options
	buffers  chunkPool
}

// New returns a Copier. dst is nil for [Copier.Stream]. The caller closes the ends.
func New(src, dst End, o Options) *Copier { return &Copier{src: src, dst: dst, opts: o} }

// SetCount sets Options.Count.
func (c *Copier) SetCount(count func(n int64)) { c.opts.Count = count }

// RateLimit returns a limit of so many bytes per second for [Options].
func RateLimit(bytes int64) *rate.Limiter {
	return rate.NewLimiter(rate.Limit(bytes), chunkSize)
}

// carryOut does the work of a task of a segment.
func (c *Copier) carryOut(ctx context.Context, t task, s *segment, p []byte) error {
	blank := c.opts.Blank && !s.again
	if t.zero {
		if blank {
			return nil
		}
		return c.zero(ctx, t)
	}
	p = p[:t.n]
	if err := c.read(ctx, p, t.off); err != nil {
		return err
	}
	switch {
	case blank:
		return c.writeNonZero(ctx, p, t.off)
	case bytes.Equal(p, zeroes[:len(p)]):
		return c.zero(ctx, t)
	}
	return c.dst.WriteAt(ctx, p, t.off)
}

// count counts n bytes that have been read and dealt with.
func (c *Copier) count(n int64) {
	if c.opts.Count != nil {
		c.opts.Count(n)
	}
}

// read reads from the source, at the limited rate.
func (c *Copier) read(ctx context.Context, p []byte, off int64) error {
	if c.opts.Rate != nil {
		if err := c.opts.Rate.WaitN(ctx, len(p)); err != nil {
			return err
		}
	}
	return c.src.ReadAt(ctx, p, off)
}

// zero zeroes a range of the destination, except for those parts that are known to read as
// zeroes: zeroing might allocate storage for them.
func (c *Copier) zero(ctx context.Context, t task) error {
	ask := c.dst.Extents()
	if ask == nil {
		return c.dst.Zero(ctx, t.off, t.n)
	}
	unit := c.dst.Unit()
	return extents.Walk(ctx, t.off, t.off+t.n, ask, func(e extents.Extent) error {
		if e.IsZero() {
			return nil
		}
		begin, end := max(down(e.Off, unit), t.off), min(down(e.End()+unit-1, unit), t.off+t.n)
		return c.dst.Zero(ctx, begin, end-begin)
	})
}

// writeNonZero writes the parts of a chunk that are not zero. So the copy of a source without
// known holes can have holes.
func (c *Copier) writeNonZero(ctx context.Context, p []byte, off int64) error {
	step := max(grain, c.dst.Unit())
	for begin := int64(0); begin < int64(len(p)); {
		end := begin
		for end < int64(len(p)) {
			block := p[end:min(end+step, int64(len(p)))]
			if bytes.Equal(block, zeroes[:len(block)]) {
				break
			}
			end += int64(len(block))
		}
		if end > begin {
			if err := c.dst.WriteAt(ctx, p[begin:end], off+begin); err != nil {
				return err
			}
		}
		begin = end + step // the block at end is zero, or there is none
	}
	return nil
}

// Verify compares all of the source with the destination, or the changed blocks after a copy
// of these. It does not use block status, because it also verifies that the holes were right.
func (c *Copier) Verify(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	tasks := make(chan task)
	g.Go(func() error {
		defer close(tasks)
		return c.compared(ctx, func(t task) error { return give(ctx, tasks, t) })
	})
	for range c.workers(2) {
		g.Go(func() error {
			bufs := c.buffers.take(2)
			defer c.buffers.put(bufs)
			for t := range tasks {
				if err := c.compare(ctx, t, bufs[0][:t.n], bufs[1][:t.n]); err != nil {
					return err
				}
				c.count(t.n)
			}
			return nil
		})
	}
	return g.Wait()
}

// compared calls put for the ranges that Verify compares.
func (c *Copier) compared(ctx context.Context, put func(task) error) error {
	if c.opts.Changes == nil {
		return split(task{0, c.src.Size(), false}, put)
	}
	return c.plan(ctx, 0, c.src.Size(), func(t task) error { return split(task{t.off, t.n, false}, put) })
}

func (c *Copier) compare(ctx context.Context, t task, want, got []byte) error {
	if err := c.read(ctx, want, t.off); err != nil {
		return err
	}
	if err := c.dst.ReadAt(ctx, got, t.off); err != nil {
		return err
	}
	if at := Difference(want, got); at >= 0 {
		return &DifferenceError{c.dst.Name(), t.off + at}
	}
	return nil
}

// DifferenceError is returned by Verify for a destination that differs from the source.
type DifferenceError struct {
	Name   string // of the destination
	Offset int64  // of a byte that differs
}

func (e *DifferenceError) Error() string {
	return fmt.Sprintf("%s differs from the source at offset %d", e.Name, e.Offset)
}

// Difference returns the index of the first byte that differs, or -1.
func Difference(a, b []byte) int64 {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return int64(i)
		}
	}
	return -1
}

// workers returns how many requests may be in flight on all connections: the number that
// the user allows, limited by the memory if each request needs so many chunks.
func (c *Copier) workers(chunks int) int {
	lanes := c.src.Lanes()
	if c.dst != nil {
		lanes = max(lanes, c.dst.Lanes())
	}
	return min(lanes*c.opts.Requests, maxBuffers/(chunks*chunkSize))
}

// give sends v, unless ctx is done first.
func give[T any](ctx context.Context, to chan<- T, v T) error {
	select {
	case to <- v:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
