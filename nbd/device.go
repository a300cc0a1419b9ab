package nbd

import (
	"io"
	"math/bits"

	"xapi-nbd/nbd/wire"
)

// Device is what an export reads from.
//
// ReadAt is called concurrently, for ranges inside [0, Size), at any
// alignment; it returns all bytes or an error (io.EOF beside all bytes is
// fine). Size is in bytes and constant while the device is open. Close is
// called exactly once, after all calls of ReadAt have returned.
type Device interface {
	io.ReaderAt
	Size() int64
	Close() error
}

// BlockSizer is a Device that knows its size constraints in bytes: minimum and
// preferred block size and maximum payload, section "Size constraints". Zero
// means the default of 1, 4096 and 32 MiB; invalid values are replaced by the
// nearest valid ones.
type BlockSizer interface {
	BlockSizes() (minimum, preferred, maxPayload uint32)
}

// Describer is a Device that has a text for people (NBD_INFO_DESCRIPTION):
// at most 4096 bytes of UTF-8 without NUL.
type Describer interface {
	Description() string
}

// Namer is a Device that has a canonical name (NBD_INFO_NAME) other than the
// name that the client asked for, which is what clients get without it.
type Namer interface {
	CanonicalName() string
}

// defaultPreferred is the page size: what storage and page cache do without
// reading twice.
const defaultPreferred = 4096

// blockSizesOf asks the device and makes the answer valid, section "Size
// constraints".
func blockSizesOf(d Device) wire.BlockSizes {
	var b wire.BlockSizes
	if s, ok := d.(BlockSizer); ok {
		b.Min, b.Preferred, b.MaxPayload = s.BlockSizes()
	}
	b.Min = min(powerOf2(max(b.Min, 1)), wire.MaxMinBlock)
	if b.Preferred == 0 {
		b.Preferred = defaultPreferred
	}
	b.Preferred = min(max(powerOf2(b.Preferred), b.Min, 512), wire.DefaultMaxPayload)
	if b.MaxPayload == 0 {
		b.MaxPayload = wire.DefaultMaxPayload
	}
	b.MaxPayload = max(min(b.MaxPayload, wire.DefaultMaxPayload)/b.Min*b.Min, b.Preferred)
	return b
}

// powerOf2 rounds up to a power of 2, at most 2^31.
func powerOf2(v uint32) uint32 {
	if v&(v-1) == 0 {
		return v
	}
	return 1 << min(bits.Len32(v), 31)
}
