package nbd

import (
	"context"

	"xapi-nbd/nbd/wire"
)

// proxied is the export of another server as a Device of this one. It has the methods
// that a server calls where those of *Conn have other parameters.
type proxied struct{ *Conn }

// capabilities are what the other server advertises.
func (p proxied) capabilities() capabilities {
	has := func(f wire.TransmissionFlags) bool { return p.info.Flags&f != 0 }
	c := capabilities{multi: true}
	if has(wire.FlagSendCache) {
		c.cacher = p
	}
	if _, ok := p.contexts.id(wire.BaseAllocation); ok {
		c.extenter = p
	}
	if has(wire.FlagReadOnly) {
		return c
	}
	c.writer = p
	c.multi = has(wire.FlagCanMultiConn)
	if has(wire.FlagSendFlush) {
		c.flusher = p
	}
	if has(wire.FlagSendFUA) {
		c.fua = p
	}
	if has(wire.FlagSendTrim) {
		c.trimmer = p
	}
	if has(wire.FlagSendWriteZeroes) {
		c.zeroer, c.fastZero = p, has(wire.FlagSendFastZero)
	}
	return c
}

// BlockSizes implements BlockSizer.
func (p proxied) BlockSizes() (minimum, preferred, maxPayload uint32) {
	s := p.Conn.BlockSizes()
	return s.Min, s.Preferred, s.MaxPayload
}

// Description implements Describer.
func (p proxied) Description() string { return p.info.Description }

// Flush implements Flusher.
func (p proxied) Flush() error { return p.Conn.Flush(context.Background()) }

// Trim implements Trimmer.
func (p proxied) Trim(off, n int64) error { return p.Conn.Trim(context.Background(), off, n, false) }

// WriteZeroes implements ZeroWriter.
func (p proxied) WriteZeroes(off, n int64, noHole, fast bool) error {
	return p.Conn.WriteZeroes(context.Background(), off, n, ZeroOptions{NoHole: noHole, Fast: fast})
}

// Cache implements Cacher.
func (p proxied) Cache(off, n int64) error { return p.Conn.Cache(context.Background(), off, n) }

// Extents implements Extenter.
func (p proxied) Extents(off, n int64) ([]wire.Extent, error) {
	return p.BlockStatus(context.Background(), wire.BaseAllocation, off, n)
}

func (p proxied) writeFUA(b []byte, off int64) error {
	return p.Write(context.Background(), b, off, true)
}

func (p proxied) trimFUA(off, n int64) error { return p.Conn.Trim(context.Background(), off, n, true) }

func (p proxied) zeroFUA(off, n int64, noHole, fast bool) error {
	return p.Conn.WriteZeroes(context.Background(), off, n, ZeroOptions{NoHole: noHole, Fast: fast, FUA: true})
}
