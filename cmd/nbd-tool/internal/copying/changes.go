package copying

import (
	"context"
	"fmt"
	"slices"

	"xapi-nbd/cmd/nbd-tool/internal/extents"
	"xapi-nbd/nbd/wire"
)

// Changes tells which blocks of a source have changed since a base.
type Changes struct {
	ask    extents.Asker
	kindOf func(state uint64) taskKind
	// changed is a state that says that an extent has changed.
	changed uint64
}

// CopyFrom makes all of the source from limit on count as changed, except ranges that are
// known to be zero: the destination ended at limit.
func (c *Changes) CopyFrom(limit int64) {
	ask := c.ask
	c.ask = func(ctx context.Context, off, n int64) ([]wire.Extent, error) {
		if off < limit {
			n = min(n, limit-off)
		}
		answer, err := ask(ctx, off, n)
		for i, e := range answer {
			switch {
			case off < limit: // the last one may be longer than asked
				answer[i].Length = min(e.Length, uint64(limit-off))
				off += int64(answer[i].Length)
			case c.kindOf(e.Status) == leaveAsIs:
				answer[i].Status = c.changed
			}
		}
		return answer, err
	}
}

// ChangesContexts returns the metadata contexts to ask for.
func ChangesContexts(base string) []string {
	return []string{extents.UnchangedContext + base, extents.DirtyContext + base}
}

// ChangesSince finds the context that was granted. Holes may be unknown, changes may not: if
// the server has granted neither context, the error says so.
func ChangesSince(e *Export, base string) (*Changes, error) {
	granted := e.pool.MetaContexts()
	c := &Changes{kindOf: func(state uint64) taskKind {
		switch {
		case state&extents.StateUnchanged != 0:
			return leaveAsIs
		case state&extents.StateZeroNow != 0:
			return makeZero
		}
		return copyData
	}}
	name := extents.UnchangedContext + base
	if !slices.Contains(granted, name) {
		name, c.changed = extents.DirtyContext+base, extents.StateDirty
		c.kindOf = kindOfDirty
	}
	if !slices.Contains(granted, name) {
		return nil, fmt.Errorf("%s: the server does not know which blocks have changed since %s; its log has the reason", e.name, base)
	}
	c.ask = func(ctx context.Context, off, n int64) ([]wire.Extent, error) {
		answer, err := e.pool.BlockStatus(ctx, name, off, n)
		if err == nil && (len(answer) == 0 || answer[0].Length == 0) {
			err = fmt.Errorf("no status of %s", name)
		}
		return answer, e.failed("changed blocks", off, err)
	}
	return c, nil
}

// kindOfDirty returns the kind of work for an extent of a bitmap.
func kindOfDirty(state uint64) taskKind {
	if state&extents.StateDirty == 0 {
		return leaveAsIs
	}
	return copyData
}
