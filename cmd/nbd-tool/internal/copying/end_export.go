package copying

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"xapi-nbd/cmd/nbd-tool/internal/extents"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
)

// Export is an export as an [End], over the connections of a pool.
type Export struct {
	pool    *client.Pool
	name    string
	hint    func(error) string
	noZeros atomic.Bool // the server does not support WRITE_ZEROES
}

// NewExport returns the end of a pool, which it closes. name stands for the export in
// messages; hint returns advice for an error, to be put behind it, or "".
func NewExport(pool *client.Pool, name string, hint func(error) string) *Export {
	e := &Export{pool: pool, name: name, hint: hint}
	e.noZeros.Store(pool.Info().Flags&wire.FlagSendWriteZeroes == 0)
	return e
}

// Pool returns the pool.
func (e *Export) Pool() *client.Pool { return e.pool }

// Name implements [End].
func (e *Export) Name() string { return e.name }

// Size implements [End].
func (e *Export) Size() int64 { return e.pool.Size() }

// Unit implements [End].
func (e *Export) Unit() int64 { return int64(e.pool.BlockSizes().Min) }

// Lanes implements [End].
func (e *Export) Lanes() int { return e.pool.Connections() }

// Losses implements [End].
func (e *Export) Losses() int64 { return e.pool.Changes() }

// Close implements [End].
func (e *Export) Close() error { return e.pool.Close() }

// Extents implements [End]. If the server returns an error or an invalid reply, the state of
// the range is not known and the copy goes on. The end of the pool and of ctx are errors.
func (e *Export) Extents() extents.Asker {
	if !slices.Contains(e.pool.MetaContexts(), wire.BaseAllocation) {
		return nil
	}
	return func(ctx context.Context, off, n int64) ([]wire.Extent, error) {
		answer, err := e.pool.BlockStatus(ctx, wire.BaseAllocation, off, n)
		if err != nil && ctx.Err() == nil && e.pool.Err() == nil {
			return nil, nil
		}
		return answer, e.failed("block status", off, err)
	}
}

// ReadAt implements [End].
func (e *Export) ReadAt(ctx context.Context, p []byte, off int64) error {
	return e.failed("reading", off, e.pool.Read(ctx, p, off))
}

// WriteAt implements [End]. It writes whole blocks: if the source ends inside the last block,
// the rest of that block keeps the content of the destination.
func (e *Export) WriteAt(ctx context.Context, p []byte, off int64) error {
	unit := e.Unit()
	if whole := min(down(off+int64(len(p))+unit-1, unit), e.Size()) - off; whole > int64(len(p)) {
		blocks := make([]byte, whole)
		last := down(whole-1, unit)
		if err := e.ReadAt(ctx, blocks[last:], off+last); err != nil {
			return err
		}
		copy(blocks, p)
		p = blocks
	}
	return e.failed("writing", off, e.pool.Write(ctx, p, off, false))
}

// Zero implements [End] with WRITE_ZEROES, which may make holes. It writes zeroes where the
// server refuses that, and at the end of the source if that is inside a block.
func (e *Export) Zero(ctx context.Context, off, n int64) error {
	whole := n
	if off+n != e.Size() {
		whole = down(n, e.Unit())
	}
	if whole > 0 && !e.noZeros.Load() {
		err := e.pool.WriteZeroes(ctx, off, whole, client.ZeroOptions{})
		switch {
		case err == nil:
			off, n = off+whole, n-whole
		case !refused(err):
			return e.failed("zeroing", off, err)
		case errors.Is(err, errors.ErrUnsupported):
			e.noZeros.Store(true)
		}
	}
	return writeZeroes(ctx, e, off, n)
}

// refused reports whether an error means that the server does not support the request, or not
// with these parameters.
func refused(err error) bool {
	var answer *client.Error
	return errors.Is(err, client.ErrUnsupported) || errors.As(err, &answer) &&
		(answer.Errno == wire.ENOTSUP || answer.Errno == wire.EOVERFLOW || answer.Errno == wire.EINVAL)
}

// Trim implements [End].
func (e *Export) Trim(ctx context.Context, off, n int64) error {
	if !e.CanTrim() {
		return nil
	}
	return e.failed("trimming", off, e.pool.Trim(ctx, off, n, false))
}

// CanTrim implements [End].
func (e *Export) CanTrim() bool { return e.pool.Info().Flags&wire.FlagSendTrim != 0 }

// CanFlush implements [End].
func (e *Export) CanFlush() bool { return e.pool.Info().Flags&wire.FlagSendFlush != 0 }

// Flush implements [End]. It does nothing if the server has no FLUSH: then it writes through.
func (e *Export) Flush(ctx context.Context) error {
	if !e.CanFlush() {
		return nil
	}
	if err := e.pool.Flush(ctx); err != nil {
		return fmt.Errorf("%s: flushing: %w%s", e.name, err, e.hint(err))
	}
	return nil
}

func (e *Export) failed(action string, off int64, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %s at offset %d: %w%s", e.name, action, off, err, e.hint(err))
}
