package main

import (
	"bytes"
	"context"
	"fmt"

	"golang.org/x/sync/errgroup"

	"xapi-nbd/cmd/internal/progress"
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

// copier copies src to dst, or compares them.
type copier struct {
	src, dst end
	requests int
	changes  *changes // nil: all of the source is copied
	total    int64    // bytes that have to be read
	meter    *progress.Meter
	buffers  chunkPool
}

// task is a range of the source and the work for it. Ranges of zeroes need not be read.
type task struct {
	off, n int64
	zero   bool
}

// copy copies the source. After the first error it waits for the requests in flight and
// returns the error.
func (c *copier) copy(ctx context.Context) error {
	return c.each(ctx, 1, c.plan, func(ctx context.Context, worker int, t task, bufs [][]byte) error {
		switch {
		case t.zero && c.dst.knownZero():
			return nil
		case t.zero:
			return c.dst.zero(ctx, worker, t.off, t.n)
		}
		p := bufs[0][:t.n]
		if err := c.src.readAt(ctx, worker, p, t.off); err != nil {
			return err
		}
		if c.dst.knownZero() {
			return c.writeNonZero(ctx, worker, p, t.off)
		}
		if c.changes != nil && bytes.Equal(p, zeroes[:len(p)]) {
			return c.dst.zero(ctx, worker, t.off, t.n) // the copy stays sparse
		}
		return c.dst.writeAt(ctx, worker, p, t.off)
	})
}

// writeNonZero writes the parts of a chunk that are not zero and zeroes the others. So the
// copy of a source without known holes can have holes.
func (c *copier) writeNonZero(ctx context.Context, worker int, p []byte, off int64) error {
	step := max(grain, c.dst.unit())
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
			if err := c.dst.writeAt(ctx, worker, p[begin:end], off+begin); err != nil {
				return err
			}
		}
		begin = end + step // the block at end is zero, or there is none
	}
	return nil
}

// verify compares all of the source with the destination, or the changed blocks after a
// copy of these. It does not use block status, because it also verifies that the holes
// were right.
func (c *copier) verify(ctx context.Context) error {
	all := func(_ context.Context, put func(task) error) error { return split(task{0, c.src.size(), false}, put) }
	if c.changes != nil {
		all = func(ctx context.Context, put func(task) error) error {
			return c.plan(ctx, func(t task) error { return split(task{t.off, t.n, false}, put) })
		}
	}
	return c.each(ctx, 2, all, func(ctx context.Context, worker int, t task, bufs [][]byte) error {
		want, got := bufs[0][:t.n], bufs[1][:t.n]
		if err := c.src.readAt(ctx, worker, want, t.off); err != nil {
			return err
		}
		if err := c.dst.readAt(ctx, worker, got, t.off); err != nil {
			return err
		}
		if at := difference(want, got); at >= 0 {
			return fmt.Errorf("%s differs from the source at offset %d", c.dst.name(), t.off+at)
		}
		return nil
	})
}

// difference returns the index of the first byte that differs, or -1.
func difference(a, b []byte) int64 {
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
func (c *copier) workers(chunks int) int {
	lanes := c.src.lanes()
	if c.dst != nil {
		lanes = max(lanes, c.dst.lanes())
	}
	return min(lanes*c.requests, maxBuffers/(chunks*chunkSize))
}

// each runs all tasks of a plan in workers, in no particular order, until the first error.
// Each call gets bufs chunks.
func (c *copier) each(ctx context.Context, chunks int, plan func(context.Context, func(task) error) error,
	do func(ctx context.Context, worker int, t task, bufs [][]byte) error) error {
	g, ctx := errgroup.WithContext(ctx)
	tasks := make(chan task)
	g.Go(func() error {
		defer close(tasks)
		return plan(ctx, func(t task) error {
			select {
			case tasks <- t:
				return nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		})
	})
	for worker := range c.workers(chunks) {
		g.Go(func() error {
			bufs := c.buffers.take(chunks)
			defer c.buffers.put(bufs)
			for t := range tasks {
				if err := do(ctx, worker, t, bufs); err != nil {
					return err
				}
				if !t.zero {
					c.meter.Add(t.n)
				}
			}
			return nil
		})
	}
	return g.Wait()
}
