package main

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
)

// exportEnd is an export over one or more connections.
type exportEnd struct {
	target  *target
	conns   []*client.Conn
	blank   bool
	noZeros atomic.Bool // the server does not support WRITE_ZEROES
}

// openExport opens an export, with several connections if the server promises consistency
// between them.
func openExport(ctx context.Context, t *target, connections int, source bool, contexts ...string) (_ *exportEnd, err error) {
	if source {
		contexts = append(contexts, wire.BaseAllocation)
	}
	first, err := t.open(ctx, contexts...)
	if err != nil {
		return nil, err
	}
	e := &exportEnd{target: t, conns: []*client.Conn{first}}
	defer func() {
		if err != nil {
			_ = e.close()
		}
	}()
	flags := first.Info().Flags
	if !source && flags&wire.FlagReadOnly != 0 {
		return nil, fmt.Errorf("%s: the export is read-only", e.name())
	}
	if flags&wire.FlagCanMultiConn == 0 {
		connections = 1
	}
	for len(e.conns) < connections {
		conn, err := t.open(ctx, contexts...)
		if err != nil {
			return nil, fmt.Errorf("connection %d of %d: %w", len(e.conns)+1, connections, err)
		}
		e.conns = append(e.conns, conn)
		if conn.Size() != first.Size() {
			return nil, fmt.Errorf("%s: the export has changed its size", e.name())
		}
	}
	e.noZeros.Store(flags&wire.FlagSendWriteZeroes == 0)
	return e, nil
}

func (e *exportEnd) conn(worker int) *client.Conn { return e.conns[worker%len(e.conns)] }

func (e *exportEnd) name() string    { return e.target.uri.Server() }
func (e *exportEnd) size() int64     { return e.conns[0].Size() }
func (e *exportEnd) unit() int64     { return int64(e.conns[0].BlockSizes().Min) }
func (e *exportEnd) lanes() int      { return len(e.conns) }
func (e *exportEnd) knownZero() bool { return e.blank }

// extents asks the server for the block status. If the server returns an error or an invalid
// reply, the range counts as data and the copy goes on. A lost connection and the end of
// ctx are errors.
func (e *exportEnd) extents() asker {
	if !hasContext(e.conns[0], wire.BaseAllocation) {
		return nil
	}
	conn := e.conns[0]
	ask := allocation(conn)
	return func(ctx context.Context, off, n int64) ([]wire.Extent, error) {
		extents, err := ask(ctx, off, n)
		if err != nil && ctx.Err() == nil && conn.Err() == nil {
			return nil, nil
		}
		return extents, e.failed("block status", off, err)
	}
}

func (e *exportEnd) readAt(ctx context.Context, worker int, p []byte, off int64) error {
	return e.failed("reading", off, e.conn(worker).Read(ctx, p, off))
}

// writeAt writes whole blocks. If the source ends inside the last block, the rest of that
// block keeps the content of the destination.
func (e *exportEnd) writeAt(ctx context.Context, worker int, p []byte, off int64) error {
	conn, unit := e.conn(worker), e.unit()
	if whole := min(down(off+int64(len(p))+unit-1, unit), e.size()) - off; whole > int64(len(p)) {
		blocks := make([]byte, whole)
		last := down(whole-1, unit)
		if err := e.readAt(ctx, worker, blocks[last:], off+last); err != nil {
			return err
		}
		copy(blocks, p)
		p = blocks
	}
	return e.failed("writing", off, conn.Write(ctx, p, off, false))
}

// zero zeroes a range with WRITE_ZEROES, which may make holes. If the server does not support
// that, or not for such a length, zero writes zeroes.
func (e *exportEnd) zero(ctx context.Context, worker int, off, n int64) error {
	if !e.noZeros.Load() {
		err := e.conn(worker).WriteZeroes(ctx, off, n, client.ZeroOptions{})
		if !cannot(err) {
			return e.failed("zeroing", off, err)
		}
		e.noZeros.Store(true)
	}
	for end := off + n; off < end; off += chunkSize {
		if err := e.writeAt(ctx, worker, zeroes[:min(chunkSize, end-off)], off); err != nil {
			return err
		}
	}
	return nil
}

// cannot reports whether an error means that the server does not support the request.
func cannot(err error) bool {
	return errors.Is(err, client.ErrUnsupported) || errors.Is(err, wire.ENOTSUP) ||
		errors.Is(err, wire.EOVERFLOW) || errors.Is(err, wire.EINVAL)
}

// flush flushes one connection: with CAN_MULTI_CONN that is enough for all of them.
func (e *exportEnd) flush(ctx context.Context) error {
	if e.conns[0].Info().Flags&wire.FlagSendFlush == 0 {
		return nil // the server writes through
	}
	if err := e.conns[0].Flush(ctx); err != nil {
		return fmt.Errorf("%s: flushing: %w%s", e.name(), err, e.target.hint(err))
	}
	return nil
}

func (e *exportEnd) close() error {
	var errs []error
	for _, c := range e.conns {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

func (e *exportEnd) failed(what string, off int64, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %s at offset %d: %w%s", e.name(), what, off, err, e.target.hint(err))
}
