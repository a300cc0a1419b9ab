package nbd

import (
	"context"
	"io"
)

// ExporterFunc is a function that is an [Exporter].
type ExporterFunc func(ctx context.Context, peer Peer, name string) (Device, error)

// Open implements Exporter: it calls f.
func (f ExporterFunc) Open(ctx context.Context, peer Peer, name string) (Device, error) {
	return f(ctx, peer, name)
}

// SizedReaderAt is the part of a [Device] that has the content, such as a
// [*bytes.Reader] or a [*io.SectionReader].
type SizedReaderAt interface {
	io.ReaderAt
	Size() int64
}

// DeviceOf returns a read-only Device with the content of r, whose Close does nothing: r
// may be served by any number of connections at a time, and still belongs to the caller.
func DeviceOf(r SizedReaderAt) Device { return readerDevice{r} }

type readerDevice struct{ SizedReaderAt }

func (readerDevice) Close() error { return nil }
