package main

import (
	"context"
	"errors"
	"io"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/wire"
)

// fileEnd is a file or a block device.
type fileEnd struct {
	path  string
	dev   nbd.Device
	w     io.WriterAt
	blank bool
}

func newFileEnd(path string, d nbd.Device, blank bool) *fileEnd {
	w, _ := d.(io.WriterAt)
	return &fileEnd{path: path, dev: d, w: w, blank: blank}
}

func (f *fileEnd) name() string    { return f.path }
func (f *fileEnd) size() int64     { return f.dev.Size() }
func (f *fileEnd) unit() int64     { return 1 } // reads and writes go through the page cache
func (f *fileEnd) lanes() int      { return 1 }
func (f *fileEnd) knownZero() bool { return f.blank }
func (f *fileEnd) close() error    { return f.dev.Close() }

func (f *fileEnd) extents() asker {
	e, ok := f.dev.(nbd.Extenter)
	if !ok {
		return nil
	}
	return func(ctx context.Context, off, n int64) ([]wire.Extent, error) {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		return e.Extents(off, n)
	}
}

func (f *fileEnd) readAt(ctx context.Context, _ int, p []byte, off int64) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	n, err := f.dev.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF // the file was truncated
	}
	return err
}

func (f *fileEnd) writeAt(ctx context.Context, _ int, p []byte, off int64) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	_, err := f.w.WriteAt(p, off)
	return err
}

// zero zeroes a range with a function of the file system or of the device if there is one,
// and else by writing.
func (f *fileEnd) zero(ctx context.Context, worker int, off, n int64) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if z, ok := f.dev.(nbd.ZeroWriter); ok {
		return z.WriteZeroes(off, n, false, false)
	}
	for end := off + n; off < end; off += chunkSize {
		if err := f.writeAt(ctx, worker, zeroes[:min(chunkSize, end-off)], off); err != nil {
			return err
		}
	}
	return nil
}

func (f *fileEnd) flush(ctx context.Context) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if fl, ok := f.dev.(nbd.Flusher); ok {
		return fl.Flush()
	}
	return nil
}
