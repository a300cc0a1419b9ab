package copying

import (
	"context"
	"io"

	"golang.org/x/sync/errgroup"
)

// piece is a task whose data have to be written in order.
type piece struct {
	task
	buf  []byte
	read chan struct{} // closed when buf is filled
}

// Stream writes the source to w. As many requests as in any copy are in flight at a time,
// and as many pieces again may wait to be written in order.
func (c *Copier) Stream(ctx context.Context, w io.Writer) error {
	g, ctx := errgroup.WithContext(ctx)
	workers := c.workers(2)
	work := make(chan *piece)
	order := make(chan *piece, workers) // its length bounds the memory
	buffers := make(chan []byte, 2*workers+2)
	g.Go(func() error {
		defer close(work)
		defer close(order)
		return c.plan(ctx, 0, c.src.Size(), func(t task) error { return c.dispatch(ctx, t, work, order, buffers) })
	})
	for range workers {
		g.Go(func() error {
			for p := range work {
				if err := c.read(ctx, p.buf[:p.n], p.off); err != nil {
					return err
				}
				close(p.read)
			}
			return nil
		})
	}
	g.Go(func() error {
		for p := range order {
			if err := c.deliver(ctx, w, p); err != nil {
				return err
			}
			if p.buf != nil {
				buffers <- p.buf // never blocks: it has room for all buffers
			}
		}
		return nil
	})
	if err := g.Wait(); err != nil {
		return err
	}
	return check(c.src)
}

// dispatch queues a task for writing and, if it has to be read, for a worker.
func (c *Copier) dispatch(ctx context.Context, t task, work, order chan<- *piece, buffers <-chan []byte) error {
	p := &piece{task: t}
	if !t.zero {
		p.read = make(chan struct{})
		select {
		case p.buf = <-buffers:
		default:
			p.buf = make([]byte, chunkSize)
		}
	}
	select {
	case order <- p:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if t.zero {
		return nil
	}
	select {
	case work <- p:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// deliver waits for the data of a piece and writes it.
func (c *Copier) deliver(ctx context.Context, w io.Writer, p *piece) error {
	if p.zero {
		for left := p.n; left > 0; left -= chunkSize {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			if _, err := w.Write(zeroes[:min(left, chunkSize)]); err != nil {
				return err
			}
		}
		return nil
	}
	select {
	case <-p.read:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if _, err := w.Write(p.buf[:p.n]); err != nil {
		return err
	}
	c.count(p.n)
	return nil
}
