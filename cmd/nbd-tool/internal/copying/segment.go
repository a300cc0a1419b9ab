package copying

import (
	"context"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
)

// maxSegments is how many segments, besides the one that is being flushed, may be under way:
// the others go on while the destination flushes.
const maxSegments = 2

// segment is a part of the plan that is flushed as a whole.
type segment struct {
	begin, end int64
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
	return g.Wait()
}

// plan cuts the plan into segments of about Options.Segment bytes.
func (p *pipeline) plan(ctx context.Context) error {
	size := p.c.src.Size()
	s := p.c.newSegment(p.c.opts.From, false)
	if err := give(ctx, p.order, s); err != nil {
		return err
	}
	planned := int64(0)
	err := p.c.plan(ctx, s.begin, size, func(t task) error {
		if limit := p.c.opts.Segment; limit > 0 && planned >= limit {
			s.end = t.off
			s.finish()
			s, planned = p.c.newSegment(t.off, false), 0
			if err := give(ctx, p.order, s); err != nil {
				return err
			}
		}
		planned += min(t.n, chunkSize) // long ranges of zeroes cost no more than a chunk
		return p.put(ctx, t, s)
	})
	if err != nil {
		return err
	}
	s.end = size
	s.finish()
	return nil
}

func (p *pipeline) put(ctx context.Context, t task, s *segment) error {
	s.tasks.Add(1)
	return give(ctx, p.tasks, work{t, s})
}

// flush waits for each segment, and makes it durable. A segment during which a connection to
// the destination was lost is copied again.
func (p *pipeline) flush(ctx context.Context) error {
	for s := range p.order {
		for {
			if err := wait(ctx, s); err != nil {
				return err
			}
			if err := p.c.dst.Flush(ctx); err != nil {
				return err
			}
			if p.c.dst.Losses() == s.losses {
				break
			}
			again := p.c.newSegment(s.begin, true)
			again.end = s.end
			err := p.c.plan(ctx, s.begin, s.end, func(t task) error { return p.put(ctx, t, again) })
			if err != nil {
				return err
			}
			again.finish()
			s = again
		}
		if p.c.opts.Flushed != nil {
			if err := p.c.opts.Flushed(s.end); err != nil {
				return err
			}
		}
	}
	return context.Cause(ctx)
}

func wait(ctx context.Context, s *segment) error {
	select {
	case <-s.done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
