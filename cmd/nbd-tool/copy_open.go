package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"xapi-nbd/cmd/nbd-tool/internal/copying"
	"xapi-nbd/nbd/wire"
)

// openSource opens the source.
func (j *copyJob) openSource(ctx context.Context) error {
	var err error
	if j.from.nbd == nil {
		j.src, err = copying.OpenFile(j.from.path, true)
		return err
	}
	contexts := []string{wire.BaseAllocation}
	if j.o.changedSince != "" {
		contexts = append(copying.ChangesContexts(j.o.changedSince), contexts...)
	}
	src, err := openPool(ctx, j.from, j.o.connections, j.o.retryFor, j.notices, contexts...)
	if err != nil {
		return err
	}
	j.src = src
	return nil
}

// openDestination opens, creates or empties the destination. resumed is true if it holds a
// part of the copy already.
func (j *copyJob) openDestination(ctx context.Context, resumed bool) (err error) {
	size := j.src.Size()
	switch {
	case j.to.nbd != nil:
		err = j.openDestinationExport(ctx)
		j.blank = j.o.destinationIsZero && !resumed
	default:
		fresh := false
		switch {
		case resumed: // has its size
		case j.o.increment():
			err = openCopy(j.to.path, size)
		default:
			fresh, err = prepareFile(j.to.path, size)
		}
		if err == nil {
			j.dst, err = copying.OpenFile(j.to.path, false)
		}
		j.blank = fresh || j.o.destinationIsZero && !resumed
	}
	if err != nil {
		return err
	}
	switch extra := j.dst.Size() - size; {
	case extra < 0:
		err = fmt.Errorf("%s is too small: %d bytes, the source has %d", j.dst.Name(), j.dst.Size(), size)
	case extra > 0 && !j.o.largerDestination:
		err = fmt.Errorf("%s is larger than the source: %d bytes instead of %d; --larger-destination accepts that", j.dst.Name(), j.dst.Size(), size)
	case extra > 0:
		j.notices.print("the destination is larger: its last %d bytes stay as they are", extra)
	}
	if err != nil {
		return errors.Join(err, j.dst.Close())
	}
	return nil
}

func (j *copyJob) openDestinationExport(ctx context.Context) error {
	e, err := openPool(ctx, j.to, j.o.connections, j.o.retryFor, j.notices, wire.BaseAllocation)
	if err != nil {
		return err
	}
	if e.Pool().Info().Flags&wire.FlagReadOnly != 0 {
		return errors.Join(fmt.Errorf("%s: the export is read-only", e.Name()), e.Close())
	}
	if e.Pool().Info().Flags&wire.FlagSendFlush == 0 {
		j.notices.print("%s: the server does not offer to flush: what is copied may be lost if it crashes", e.Name())
	}
	j.dst = e
	return nil
}

// prepareFile makes a file empty and of the right size; fresh is true if all of it then
// reads as zeroes. It does not change block devices.
func prepareFile(path string, size int64) (fresh bool, err error) {
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return false, err
	case st.Mode().Type() == fs.ModeDevice:
		return false, nil
	case !st.Mode().IsRegular():
		return false, fmt.Errorf("%s is neither a file nor a block device (- is standard output)", path)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o666)
	if err != nil {
		return false, err
	}
	return true, errors.Join(f.Truncate(size), f.Close())
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
		return fmt.Errorf("%s does not exist: an increment changes an existing full copy of the base", path)
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
