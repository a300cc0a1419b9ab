package nbdproxy

import (
	"context"
	"slices"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
)

var (
	_ nbd.Writer      = device{}
	_ nbd.Capable     = device{}
	_ nbd.BlockSizer  = device{}
	_ nbd.Describer   = device{}
	_ nbd.Flusher     = device{}
	_ nbd.FUAWriter   = device{}
	_ nbd.Trimmer     = device{}
	_ nbd.ZeroWriter  = device{}
	_ nbd.Cacher      = device{}
	_ nbd.MultiConner = device{}
	_ nbd.Contexter   = device{}
	_ nbd.Revocable   = device{}
	_ nbd.Extenter    = mapped{}
)

// New returns the export that conn has opened as a device. The device offers only the
// commands that the other server advertises for the export. It reports holes if conn was
// granted the metadata context base:allocation, and has the other metadata contexts that
// conn was granted, see [client.Config]. Closing the device closes conn, which must not be
// closed otherwise. When conn ends by itself, the device is revoked: see [nbd.Revocable]. To
// limit how long a client waits for a server that hangs, conn needs a ProgressTimeout.
func New(conn *client.Conn) nbd.Device {
	d := device{conn}
	if slices.Contains(conn.MetaContexts(), wire.BaseAllocation) {
		return mapped{d}
	}
	return d
}

// device adapts the methods of a connection whose parameters differ from those that
// package nbd expects.
type device struct{ *client.Conn }

// Capabilities implements [nbd.Capable] with the flags of the other server.
func (d device) Capabilities() wire.TransmissionFlags { return d.Info().Flags }

// BlockSizes implements [nbd.BlockSizer].
func (d device) BlockSizes() (minimum, preferred, maxPayload uint32) {
	s := d.Conn.BlockSizes()
	return s.Min, s.Preferred, s.MaxPayload
}

// Description implements [nbd.Describer].
func (d device) Description() string { return d.Info().Description }

// Lifetime implements [nbd.Revocable]: it ends with the connection. Clients can only connect
// again then, as every request would fail.
func (d device) Lifetime() context.Context {
	ctx, end := context.WithCancelCause(context.Background())
	go func() { // returns when Close closes the connection, at the latest
		<-d.Done()
		end(d.Err())
	}()
	return ctx
}

// Flush implements [nbd.Flusher].
func (d device) Flush() error { return d.Conn.Flush(context.Background()) }

// Trim implements [nbd.Trimmer].
func (d device) Trim(off, n int64) error { return d.Conn.Trim(context.Background(), off, n, false) }

// WriteZeroes implements [nbd.ZeroWriter].
func (d device) WriteZeroes(off, n int64, noHole, fast bool) error {
	return d.Conn.WriteZeroes(context.Background(), off, n, client.ZeroOptions{NoHole: noHole, Fast: fast})
}

// Cache implements [nbd.Cacher].
func (d device) Cache(off, n int64) error { return d.Conn.Cache(context.Background(), off, n) }

// MultiConn implements [nbd.MultiConner]; Capabilities says whether the other server
// promises it.
func (d device) MultiConn() bool { return true }

// WriteFUA implements [nbd.FUAWriter].
func (d device) WriteFUA(p []byte, off int64) error {
	return d.Write(context.Background(), p, off, true)
}

// TrimFUA implements [nbd.FUAWriter].
func (d device) TrimFUA(off, n int64) error {
	return d.Conn.Trim(context.Background(), off, n, true)
}

// WriteZeroesFUA implements [nbd.FUAWriter].
func (d device) WriteZeroesFUA(off, n int64, noHole, fast bool) error {
	return d.Conn.WriteZeroes(context.Background(), off, n, client.ZeroOptions{NoHole: noHole, Fast: fast, FUA: true})
}

// Contexts implements [nbd.Contexter] with the contexts that the other server has granted,
// except base:allocation.
func (d device) Contexts() []string {
	return slices.DeleteFunc(d.MetaContexts(), func(name string) bool { return name == wire.BaseAllocation })
}

// ContextExtents implements [nbd.Contexter].
func (d device) ContextExtents(name string, off, n int64) ([]wire.Extent, error) {
	return d.BlockStatus(context.Background(), name, off, n)
}

// mapped is a device whose holes the other server reports.
type mapped struct{ device }

// Extents implements [nbd.Extenter].
func (m mapped) Extents(off, n int64) ([]wire.Extent, error) {
	return m.BlockStatus(context.Background(), wire.BaseAllocation, off, n)
}
