package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"xapi-nbd/nbd/nbdfile"
)

// An end is one side of a copy. Its methods may be called concurrently, apart
// from close; worker chooses between equal connections.
type end interface {
	// name returns the name for messages.
	name() string
	size() int64
	// unit returns the power of two of which offsets and lengths of requests must be
	// multiples, except at the end of the source.
	unit() int64
	// lanes returns the number of connections.
	lanes() int
	// extents is an asker; a nil result means that the status is unknown.
	extents() asker
	// knownZero reports whether all of it read as zeroes when it was opened.
	knownZero() bool

	readAt(ctx context.Context, worker int, p []byte, off int64) error
	writeAt(ctx context.Context, worker int, p []byte, off int64) error
	// zero makes the range read as zeroes.
	zero(ctx context.Context, worker int, off, n int64) error
	// flush makes all written data durable.
	flush(ctx context.Context) error
	close() error
}

func (o *copyOptions) openSource(ctx context.Context, s side) (end, error) {
	if s.nbd != nil {
		if o.changedSince != "" {
			return openExport(ctx, s.nbd, o.connections, true, changesContexts(o.changedSince)...)
		}
		return openExport(ctx, s.nbd, o.connections, true)
	}
	d, err := nbdfile.Open(s.path, nbdfile.Options{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	return newFileEnd(s.path, d, false), nil
}

// openDestination opens, creates or empties the destination for size bytes.
func (o *copyOptions) openDestination(ctx context.Context, s, src side, size int64) (end, error) {
	dst, err := o.destination(ctx, s, src, size)
	if err != nil {
		return nil, err
	}
	if dst.size() < size {
		return nil, errors.Join(fmt.Errorf("%s is too small: %d bytes, the source has %d", dst.name(), dst.size(), size), dst.close())
	}
	return dst, nil
}

func (o *copyOptions) destination(ctx context.Context, s, src side, size int64) (end, error) {
	if s.nbd != nil {
		e, err := openExport(ctx, s.nbd, o.connections, false)
		if err != nil {
			return nil, err
		}
		e.blank = o.destinationIsZero
		return e, nil
	}
	fresh, err := false, error(nil)
	if o.changedSince != "" {
		err = openCopy(s.path, size)
	} else {
		fresh, err = prepareFile(s.path, src.path, size)
	}
	if err != nil {
		return nil, err
	}
	d, err := nbdfile.Open(s.path, nbdfile.Options{})
	if err != nil {
		return nil, err
	}
	return newFileEnd(s.path, d, fresh || o.destinationIsZero), nil
}

// prepareFile makes a file empty and of the right size; fresh is true if all of it then
// reads as zeroes. It does not change block devices.
func prepareFile(path, src string, size int64) (fresh bool, err error) {
	if same, err := sameFile(path, src); err != nil {
		return false, err
	} else if same {
		return false, usagef("%s is both source and destination", path)
	}
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
