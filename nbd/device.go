package nbd

import (
	"context"
	"io"
	"math/bits"
	"os"

	"xapi-nbd/nbd/wire"
)

// Device is what an export reads from.
//
// ReadAt is called concurrently, for ranges inside [0, Size), at any
// alignment; it returns all bytes or an error (io.EOF beside all bytes is
// fine). Size is in bytes and constant while the device is open. Close is
// called exactly once, after all calls of ReadAt have returned.
//
// A method that panics fails its request with NBD_EIO, or its connection.
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

// Writer is a Device that can be written; every other Device is served read-only,
// whatever else it can do.
//
// WriteAt stores all bytes or returns an error. It is called concurrently, for ranges
// inside [0, Size), at any alignment that the minimum block size allows. It may return
// before the bytes are on stable storage: see [Flusher] and [WriteThrough].
type Writer interface {
	Device
	io.WriterAt
}

// Flusher is a [Writer] that can put on stable storage everything whose WriteAt, Trim or
// WriteZeroes returned before the call, section "NBD_CMD_FLUSH". It is called
// concurrently with everything else. The server calls it for NBD_CMD_FLUSH, and after a
// request with NBD_CMD_FLAG_FUA before the reply.
//
// A Writer that is neither a Flusher nor a [WriteThrough] cannot promise that anything
// is on stable storage, so the server advertises neither NBD_FLAG_SEND_FLUSH nor
// NBD_FLAG_SEND_FUA for it, and refuses both with NBD_EINVAL.
type Flusher interface {
	Flush() error
}

// FUAWriter is a [Writer] that can put one change on stable storage without flushing
// every other change. Its methods do what WriteAt, Trim and WriteZeroes do, and return
// when the change is on stable storage. The server calls them for requests with
// NBD_CMD_FLAG_FUA; for a Writer without them it calls the method without FUA and then
// Flush. TrimFUA is called only if the device is a [Trimmer], WriteZeroesFUA only if it
// is a [ZeroWriter].
type FUAWriter interface {
	WriteFUA(p []byte, off int64) error
	TrimFUA(off, n int64) error
	WriteZeroesFUA(off, n int64, noHole, fast bool) error
}

// WriteThrough is a [Writer] without Flush that may declare that WriteAt, Trim and
// WriteZeroes return only when the change is on stable storage. If WritesThrough
// reports true, FLUSH and FUA are offered and need nothing to be done. It is asked once
// for each connection.
type WriteThrough interface {
	WritesThrough() bool
}

// Trimmer is a [Writer] that can give storage back. What the range reads
// as afterwards is not defined.
type Trimmer interface {
	Trim(off, n int64) error
}

// ZeroWriter is a [Writer] that has a better way to zero a range than
// writing zeroes. With noHole the range stays allocated. With fast the call
// must be much faster than writing, or fail at once with an error that matches
// [wire.ENOTSUP] (or syscall.ENOTSUP) and change nothing.
type ZeroWriter interface {
	WriteZeroes(off, n int64, noHole, fast bool) error
}

// Cacher is a Device that can be told that a range will be read soon. It may do
// nothing.
type Cacher interface {
	Cache(off, n int64) error
}

// Extenter is a Device that knows which parts of it are holes or zeroes, for
// the metadata context base:allocation. Extents begin at off, follow on from
// each other, have lengths above 0, and cover at least the first byte; the last
// may end before or behind off+n, but not behind Size. Without it everything is
// allocated data.
type Extenter interface {
	Extents(off, n int64) ([]wire.Extent, error)
}

// MultiConner is a [Writer] that may promise that what one connection
// has flushed every other one reads. Read-only devices keep that promise by
// nature.
type MultiConner interface {
	MultiConn() bool
}

// Capable is a Device that has more methods than it can serve. A proxy, for example,
// has the methods of every capability, but can do only what the device behind it can.
//
// The server calls Capabilities once, when a client opens the export. It offers a
// capability if the device has the method for it and the flag is set: [Writer] unless
// [wire.FlagReadOnly] is set, [Flusher] and [WriteThrough] for [wire.FlagSendFlush],
// [FUAWriter] for [wire.FlagSendFUA], [Trimmer] for [wire.FlagSendTrim], [ZeroWriter] for
// [wire.FlagSendWriteZeroes] (and its parameter fast for [wire.FlagSendFastZero]),
// [Cacher] for [wire.FlagSendCache], [MultiConner] for [wire.FlagCanMultiConn]. Other
// flags mean nothing here.
type Capable interface {
	Capabilities() wire.TransmissionFlags
}

// FileBacked is a Device whose bytes are those of a file or block device, at the
// same offsets. The server may then read from the file instead of calling ReadAt.
// On connections without TLS it sends long reads from the file to the socket with
// splice(2), without copying them.
//
// The server calls File once when a client opens the export. The file must stay open
// until the device is closed. If File returns nil, the server calls ReadAt as for
// every other Device.
//
// The server calls Verify after it has read n bytes at off from the file, and before
// it sends any of them. If Verify returns an error, the request fails with that error
// and no data is sent. Verify is called concurrently.
type FileBacked interface {
	File() *os.File
	Verify(off, n int64) error
}

// Describer is a Device that has a text for people (NBD_INFO_DESCRIPTION):
// at most 4096 bytes of UTF-8 without NUL.
type Describer interface {
	Description() string
}

// Namer is a Device that has a canonical name (NBD_INFO_NAME) other than the
// name that the client asked for, which is what clients get without it. Devices with
// the same name share what a device may have of [Server.MaxInflightBytes].
type Namer interface {
	CanonicalName() string
}

// Revocable is a Device that can become unusable while a client uses it, for example
// because the disk was unplugged or because the client's session was logged out.
//
// The server calls Lifetime once, when the transmission phase begins. When that context
// is done, the server starts no further request, waits up to a second for the replies
// to the requests in flight, and closes the connection. [context.Cause] is the reason;
// it is logged, so it must hold no secrets. Calls that are running then should fail
// soon: the device is closed only when all of them have returned. A nil context means
// that this device is never revoked.
type Revocable interface {
	Lifetime() context.Context
}

// ErrorCloser is a Device that needs to know how its transmission phase ended, section
// "Terminating the transmission phase".
//
// The server calls CloseWithError instead of Close, exactly once, when the connection
// is closed and all other calls have returned. err is nil after NBD_CMD_DISC, otherwise
// it is the error that [Server.ServeConn] returns. If the connection ended during the
// handshake, the server calls Close. A type that embeds an ErrorCloser and overrides
// Close must override CloseWithError too.
type ErrorCloser interface {
	CloseWithError(err error) error
}

// blockSizesOf asks the device and makes the answer valid, section "Size
// constraints".
func blockSizesOf(d Device) wire.BlockSizes {
	var b wire.BlockSizes
	if s, ok := unwrap(d).(BlockSizer); ok {
		b.Min, b.Preferred, b.MaxPayload = s.BlockSizes()
	}
	b.Min = min(powerOf2(max(b.Min, 1)), wire.MaxMinBlock)
	if b.Preferred == 0 {
		b.Preferred = wire.DefaultPreferredBlock
	}
	b.Preferred = min(max(powerOf2(b.Preferred), b.Min, wire.MinPreferredBlock), wire.DefaultMaxPayload)
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
