package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"xapi-nbd/nbd/wire"
)

// The metadata contexts of the blocks that have changed since a base: prefixes of the name
// of the base.
const (
	unchangedContext = "x-xapi:unchanged:"  // of xapi-nbd
	dirtyContext     = "qemu:dirty-bitmap:" // of QEMU, and of others
)

// The states of unchangedContext.
const (
	stateUnchanged uint64 = 1 << 0
	stateZeroNow   uint64 = 1 << 1 // changed, and reads as zeroes
)

// stateDirty is the state of dirtyContext.
const stateDirty uint64 = 1 << 0

// changes finds the blocks of a source that have changed since a base.
type changes struct {
	ask    asker
	kindOf func(state uint64) taskKind
	// changed is a state that says that an extent has changed.
	changed uint64
}

// copyFrom makes all of the source from limit on count as changed, except what is known
// to be zero: the destination ended there.
func (c *changes) copyFrom(limit int64) {
	ask := c.ask
	c.ask = func(ctx context.Context, off, n int64) ([]wire.Extent, error) {
		if off < limit {
			n = min(n, limit-off)
		}
		extents, err := ask(ctx, off, n)
		for i, e := range extents {
			switch {
			case off < limit: // the last one may be longer than asked
				extents[i].Length = min(e.Length, uint64(limit-off))
				off += int64(extents[i].Length)
			case c.kindOf(e.Status) == leaveAsIs:
				extents[i].Status = c.changed
			}
		}
		return extents, err
	}
}

// changesContexts returns the metadata contexts to ask for.
func changesContexts(base string) []string {
	return []string{unchangedContext + base, dirtyContext + base}
}

// changesSince finds the context that was granted. Holes may be unknown, changes may not: if
// the server has granted neither context, the error says so.
func changesSince(e *exportEnd, base string) (*changes, error) {
	conn := e.conns[0]
	granted := conn.MetaContexts()
	c := &changes{kindOf: func(state uint64) taskKind {
		switch {
		case state&stateUnchanged != 0:
			return leaveAsIs
		case state&stateZeroNow != 0:
			return makeZero
		}
		return copyData
	}}
	name := unchangedContext + base
	if !slices.Contains(granted, name) {
		name, c.changed = dirtyContext+base, stateDirty
		c.kindOf = func(state uint64) taskKind {
			if state&stateDirty == 0 {
				return leaveAsIs
			}
			return copyData
		}
	}
	if !slices.Contains(granted, name) {
		return nil, fmt.Errorf("%s: the server does not know which blocks have changed since %s; its log has the reason", e.name(), base)
	}
	c.ask = func(ctx context.Context, off, n int64) ([]wire.Extent, error) {
		extents, err := conn.BlockStatus(ctx, name, off, n)
		if err == nil && (len(extents) == 0 || extents[0].Length == 0) {
			err = fmt.Errorf("no status of %s", name)
		}
		return extents, e.failed("changed blocks", off, err)
	}
	return c, nil
}

// lengthOf returns the length of a file, at most size. Anything else has size bytes.
func lengthOf(path string, size int64) int64 {
	st, err := os.Stat(path)
	if err != nil || !st.Mode().IsRegular() {
		return size
	}
	return min(size, st.Size())
}

// openCopy prepares a file that holds a full copy of the base for the changes. The disk
// may have grown since then. Block devices and exports need no preparation.
func openCopy(path string, size int64) error {
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s does not exist: --changed-since changes an existing full copy of the base", path)
	case err != nil:
		return err
	case st.Mode().Type() == fs.ModeDevice:
		return nil
	case !st.Mode().IsRegular():
		return fmt.Errorf("%s is neither a file nor a block device", path)
	case st.Size() > size:
		return fmt.Errorf("%s is no copy of the base: it has %d bytes, the source has %d", path, st.Size(), size)
	case st.Size() < size:
		return os.Truncate(path, size)
	}
	return nil
}
