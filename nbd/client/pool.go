package client

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"xapi-nbd/nbd/wire"
)

// PoolConfig is the configuration of a [Pool]. Only Open is required.
type PoolConfig struct {
	// Open connects to the server and opens the export, within the limits of ctx. The
	// Pool calls it for each of its connections and for each attempt to make a lost
	// connection again, perhaps for several at the same time.
	Open func(ctx context.Context) (*Conn, error)

	// Connections is the number of connections, if the server promises consistency
	// between them (NBD_FLAG_CAN_MULTI_CONN). Without that promise the Pool has one
	// connection. Below 1 means 1.
	Connections int

	// RetryFor is how long the Pool tries to make a lost connection again. 0 means not
	// at all: calls fail with the error of the connection.
	RetryFor time.Duration

	// SameExport reports whether an export that was opened again is the one that was
	// opened first. Nil compares the descriptions. In any case the sizes and the minimum
	// block sizes must be equal, and the features of the first export must be offered again.
	SameExport func(first, again wire.ExportInfo) bool

	// Lost is called when a connection has been lost and will be made again, Failed
	// after each attempt that has failed, Restored when the connection has been made
	// again. They may be nil, and may be called concurrently.
	Lost, Failed func(err error)
	Restored     func()
}

// Pool is an open export over one or more connections. When a connection is lost, the Pool
// makes it again, with growing pauses between the attempts, and repeats the requests that
// were in flight. Its methods may be called concurrently. The caller must call
// [Pool.Close].
//
// A connection counts as lost if it broke, if the server closed it or announced that it
// shuts down, and after [Config.ProgressTimeout]. Then these errors end the attempts:
// a certificate that cannot be verified, and refusals other than NBD_REP_ERR_UNKNOWN,
// NBD_REP_ERR_POLICY and NBD_REP_ERR_SHUTDOWN, which a server that has just started may
// send for a while. If the server shows another export than before, all further calls
// fail. Errors that the server reports for a request (NBD_EIO and others) are returned,
// and nothing is repeated.
//
// A repeated write may be executed twice, the first time late. So writes to overlapping
// ranges must not be in flight at the same time. Writes that were not flushed before a
// connection was lost may be lost with it: see [Pool.Losses].
type Pool struct {
	cfg       PoolConfig
	first     *Conn // for its information only: it may have ended
	ctx       context.Context
	cancel    context.CancelCauseFunc
	restoring sync.WaitGroup

	mu       sync.Mutex // guards the fields below
	slots    []*slot
	losses   int64
	restored int64         // connections that were made again
	err      error         // why all calls fail; nil while they do not
	changed  chan struct{} // closed and replaced when slots or err change
}

// slot is the place of one connection.
type slot struct {
	conn *Conn // nil while it is lost
	busy int   // calls that use conn
	gone error // why conn is not made again
}

// NewPool makes the first connection, then the others, several at the same time. If one of them
// fails, it closes the others and returns the error: only connections that are lost later are
// made again. ctx limits NewPool, not the Pool.
func NewPool(ctx context.Context, cfg PoolConfig) (*Pool, error) {
	first, err := cfg.Open(ctx)
	if err != nil {
		return nil, err
	}
	p := &Pool{cfg: cfg, first: first, slots: []*slot{{conn: first}}, changed: make(chan struct{})}
	p.ctx, p.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	if first.Info().Flags&wire.FlagCanMultiConn == 0 {
		return p, nil
	}
	if err := p.openOthers(ctx); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

// openAtOnce is how many connections are made at the same time: few enough for servers that
// accept them slowly.
const openAtOnce = 4

// openOthers makes all connections but the first, several at the same time, because each takes
// several round trips. It returns the first error.
func (p *Pool) openOthers(ctx context.Context) error {
	opening, cancel := context.WithCancel(ctx)
	defer cancel()
	var (
		others sync.WaitGroup
		failed sync.Once
		first  error
	)
	turns := make(chan struct{}, openAtOnce)
	for n := 2; n <= p.cfg.Connections; n++ {
		s := &slot{}
		p.slots = append(p.slots, s)
		others.Go(func() {
			turns <- struct{}{}
			defer func() { <-turns }()
			conn, err := p.open(opening)
			if err != nil {
				failed.Do(func() { first = fmt.Errorf("connection %d of %d: %w", n, p.cfg.Connections, err) })
				cancel()
				return
			}
			s.conn = conn
		})
	}
	others.Wait()
	return first
}

// Size returns the size of the export in bytes.
func (p *Pool) Size() int64 { return p.first.Size() }

// Info returns the server's information about the export, from the first connection.
func (p *Pool) Info() wire.ExportInfo { return p.first.Info() }

// BlockSizes returns the size constraints that the Pool observes; see [Conn.BlockSizes].
func (p *Pool) BlockSizes() wire.BlockSizes { return p.first.BlockSizes() }

// MetaContexts returns the names of the metadata contexts that the server has granted.
func (p *Pool) MetaContexts() []string { return p.first.MetaContexts() }

// Connections returns the number of connections, lost ones included.
func (p *Pool) Connections() int { return len(p.slots) }

// Losses returns how many connections have been lost up to now.
func (p *Pool) Losses() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.losses
}

// Changes returns how many connections have been lost or made again up to now. A write is on
// stable storage for certain if Changes returned the same number before the write began and
// after a later Flush. When a connection is lost, the server may have ended, and its writes
// since the last flush are lost with it; and a connection that is made again may lead to a
// server that has begun anew, while the end of the other connections is not known yet.
func (p *Pool) Changes() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.losses + p.restored
}

// Err returns why all further calls fail, or nil while they do not. After [Pool.Close] it
// matches [net.ErrClosed].
func (p *Pool) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// Read is [Conn.Read], repeated if the connection is lost.
func (p *Pool) Read(ctx context.Context, b []byte, off int64) error {
	return p.do(ctx, func(c *Conn) error { return c.Read(ctx, b, off) })
}

// Write is [Conn.Write], repeated if the connection is lost.
func (p *Pool) Write(ctx context.Context, b []byte, off int64, fua bool) error {
	return p.do(ctx, func(c *Conn) error { return c.Write(ctx, b, off, fua) })
}

// WriteZeroes is [Conn.WriteZeroes], repeated if the connection is lost.
func (p *Pool) WriteZeroes(ctx context.Context, off, n int64, z ZeroOptions) error {
	return p.do(ctx, func(c *Conn) error { return c.WriteZeroes(ctx, off, n, z) })
}

// Trim is [Conn.Trim], repeated if the connection is lost.
func (p *Pool) Trim(ctx context.Context, off, n int64, fua bool) error {
	return p.do(ctx, func(c *Conn) error { return c.Trim(ctx, off, n, fua) })
}

// Flush puts all changes on stable storage whose calls have returned before, over all
// connections. If one was lost, changes may be missing: see [Pool.Losses]. It is repeated if
// its own connection is lost.
func (p *Pool) Flush(ctx context.Context) error {
	return p.do(ctx, func(c *Conn) error { return c.Flush(ctx) })
}

// BlockStatus is [Conn.BlockStatus], repeated if the connection is lost.
func (p *Pool) BlockStatus(ctx context.Context, metaContext string, off, n int64) (extents []wire.Extent, err error) {
	err = p.do(ctx, func(c *Conn) (err error) {
		extents, err = c.BlockStatus(ctx, metaContext, off, n)
		return err
	})
	return extents, err
}

// do makes a call over one of the connections, and again if the connection is lost: at once
// for the first time, then with growing pauses, as the call may be the reason of the loss.
func (p *Pool) do(ctx context.Context, call func(*Conn) error) error {
	var firstLoss time.Time
	for pause := time.Duration(0); ; pause = min(max(2*pause, firstPause), maxPause) {
		s, conn, err := p.acquire(ctx)
		if err != nil {
			return err
		}
		err = call(conn)
		p.release(ctx, s, conn, err)
		switch {
		case err == nil || ctx.Err() != nil || !interrupted(err) || p.cfg.RetryFor == 0:
			return err
		case firstLoss.IsZero():
			firstLoss = time.Now()
		case time.Since(firstLoss) >= p.cfg.RetryFor:
			return fmt.Errorf("repeated for %v, and each time the connection was lost: %w", p.cfg.RetryFor, err)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// acquire returns the connection with the fewest calls. If all are lost it waits until one is
// made again. The caller releases the connection.
func (p *Pool) acquire(ctx context.Context) (*slot, *Conn, error) {
	for {
		p.mu.Lock()
		err, changed := p.err, p.changed
		if err == nil {
			if s := p.pick(); s != nil {
				conn := s.conn
				s.busy++
				p.mu.Unlock()
				return s, conn, nil
			}
			err, changed = p.err, p.changed // a loss that pick found may have ended the Pool
		}
		p.mu.Unlock()
		if err != nil {
			return nil, nil, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, nil, context.Cause(ctx)
		}
	}
}

// pick returns the slot with the fewest calls among those with a connection, or nil. The
// caller holds p.mu.
func (p *Pool) pick() (best *slot) {
	for _, s := range p.slots {
		if s.conn == nil {
			continue
		}
		if err := s.conn.Err(); err != nil { // lost while no call used it
			p.lose(s, err)
			continue
		}
		if best == nil || s.busy < best.busy {
			best = s
		}
	}
	return best
}

// release ends the use of a connection by a call that has returned err.
func (p *Pool) release(ctx context.Context, s *slot, conn *Conn, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s.conn == conn {
		s.busy--
	}
	switch {
	case err == nil || ctx.Err() != nil || s.conn != conn || p.err != nil:
	case interrupted(err):
		p.lose(s, err)
	default:
		// The error may be that of the request, and the connection have ended right after it.
		if ended := conn.Err(); interrupted(ended) {
			p.lose(s, ended)
		} else if ended != nil { // the server violates the protocol
			p.end(ended)
		}
	}
}

// end makes all further calls fail with err, if nothing else does yet. The caller holds
// p.mu.
func (p *Pool) end(err error) {
	if p.err == nil {
		p.err = err
	}
	p.signal()
}

// signal wakes the calls that wait for a connection. The caller holds p.mu.
func (p *Pool) signal() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// Close closes all connections, each as [Conn.Close] does, and ends the attempts to make lost
// ones again. It does not flush. Calls that are waiting fail with an error that matches
// [net.ErrClosed]. When Close returns, no goroutine of the Pool is left. Close may be called
// more than once.
func (p *Pool) Close() error {
	p.mu.Lock()
	if !errors.Is(p.err, errClosed) {
		p.err = errClosed
		p.signal()
	}
	slots := slices.Clone(p.slots)
	p.mu.Unlock()
	p.cancel(errClosed)
	p.restoring.Wait()
	errs := make([]error, len(slots))
	var closing sync.WaitGroup
	for i, s := range slots {
		if s.conn != nil {
			closing.Go(func() { errs[i] = s.conn.Close() })
		}
	}
	closing.Wait()
	return errors.Join(errs...)
}
