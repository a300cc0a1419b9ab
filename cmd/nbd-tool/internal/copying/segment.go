package copying

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
)

// maxSegments is how many segments, besides the one that is being flushed, may be under way:
// the others go on while the destination flushes.
const maxSegments = 2

// maxLosses is how often a segment of one request is repeated before the copy fails.
const maxLosses = 20

// errFull ends the planning of a segment.
var errFull = errors.New("the segment is full")

// segment is a part of the plan that is flushed as a whole.
type segment struct {
	begin, end int64
	planned    int64         // bytes to be written
	again      bool          // it is copied once more, after a loss
	losses     int64         // of the destination, before the first write
	tasks      atomic.Int64  // tasks that are not done, and one more while it is planned
	done       chan struct{} // closed when tasks is 0
}

func (c *Copier) newSegment(begin int64, again bool) *segment {
	s := &segment{begin: begin, again: again, losses: c.dst.Losses(), done: make(chan struct{})}
	s.tasks.Store(1)
	return s
}

// finish is called after each task, and after the planning.
func (s *segment) finish() {
	if s.tasks.Add(-1) == 0 {
		close(s.done)
	}
}

// work is a task of a segment.
type work struct {
	task
	of *segment
}

// pipeline is a copy that is under way: plan puts segments into order and their tasks into
// tasks, workers carry these out, and flush flushes the segments in order.
type pipeline struct {
	c     *Copier
	tasks chan work
	order chan *segment
}

// Copy copies the source, and flushes the destination. After the first error it waits for the
// requests in flight and returns the error.
func (c *Copier) Copy(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	p := &pipeline{c, make(chan work), make(chan *segment, maxSegments)}
	g.Go(func() error {
		defer close(p.tasks) // both that put tasks have ended
		g, ctx := errgroup.WithContext(ctx)
		g.Go(func() error {
			defer close(p.order)
			return p.plan(ctx)
		})
		g.Go(func() error { return p.flush(ctx) })
		return g.Wait()
	})
	for range c.workers(1) {
		g.Go(func() error {
			bufs := c.buffers.take(1)
			defer c.buffers.put(bufs)
			for w := range p.tasks {
				if err := c.carryOut(ctx, w.task, w.of, bufs[0]); err != nil {
					return err
				}
				if !w.zero && !w.of.again {
					c.count(w.n)
				}
				w.of.finish()
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return check(c.src, c.dst)
}

// plan cuts the plan into segments of about Options.Segment bytes.
func (p *pipeline) plan(ctx context.Context) error {
	size := p.c.src.Size()
	s := p.c.newSegment(p.c.opts.From, false)
	if err := give(ctx, p.order, s); err != nil {
		return err
	}
	err := p.c.plan(ctx, s.begin, size, func(t task) error {
		if limit := p.c.opts.Segment; limit > 0 && s.planned >= limit {
			s.end = t.off
			s.finish()
			s = p.c.newSegment(t.off, false)
			if err := give(ctx, p.order, s); err != nil {
				return err
			}
		}
		return p.put(ctx, t, s)
	})
	if err != nil {
		return err
	}
	s.end = size
	s.finish()
	return nil
}

// put hands a task out.
func (p *pipeline) put(ctx context.Context, t task, s *segment) error {
	s.planned += min(t.n, chunkSize) // zeroing a long range costs no more than writing a chunk
	s.tasks.Add(1)
	return give(ctx, p.tasks, work{t, s})
}

// flush makes the segments durable, in order.
func (p *pipeline) flush(ctx context.Context) error {
	for s := range p.order {
		durable, err := p.settle(ctx, s)
		if err == nil && !durable {
			err = p.repeat(ctx, s)
		}
		if err == nil && p.c.opts.Flushed != nil {
			err = p.c.opts.Flushed(s.end)
		}
		if err != nil {
			return err
		}
	}
	return context.Cause(ctx)
}

// settle waits until all of a segment is written, and flushes it. durable is false if a
// connection to the destination was lost since its first write: then writes of it may be
// lost, too.
func (p *pipeline) settle(ctx context.Context, s *segment) (durable bool, err error) {
	select {
	case <-s.done:
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
	if err := p.c.dst.Flush(ctx); err != nil {
		return false, err
	}
	return p.c.dst.Losses() == s.losses, nil
}

// repeat copies a segment again after a loss, in smaller segments: if connections are lost
// often, there may never be time for a large one.
func (p *pipeline) repeat(ctx context.Context, whole *segment) error {
	limit, losses := max(whole.planned, chunkSize), 0
	for begin := whole.begin; begin < whole.end; {
		s := p.c.newSegment(begin, true)
		s.end = whole.end
		err := p.c.plan(ctx, begin, whole.end, func(t task) error {
			if s.planned >= limit {
				s.end = t.off
				return errFull
			}
			return p.put(ctx, t, s)
		})
		if err != nil && !errors.Is(err, errFull) {
			return err
		}
		s.finish()
		durable, err := p.settle(ctx, s)
		switch {
		case err != nil:
			return err
		case durable:
			begin, losses = s.end, 0
			continue
		case limit == chunkSize:
			losses++
		}
		if losses >= maxLosses {
			return fmt.Errorf("%s: connections are lost too often: %d times while the range at offset %d was written", p.c.dst.Name(), losses, begin)
		}
		limit = max(limit/2, chunkSize)
	}
	return nil
}
