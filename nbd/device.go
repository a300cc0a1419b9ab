package nbd

import (
	"context"
	"io"
	"math/bits"
	"os"

	"xapi-nbd/nbd/wire"
)

// Device holds the data of an export for one connection. An [Exporter] opens it, and the
// server closes it.
//
// ReadAt returns all bytes or an error; io.EOF together with all bytes is no error. It is
// called concurrently, for ranges inside [0, Size), at any alignment. Size returns the
// size in bytes, which must not change. Close is called exactly once, after all other
// calls have returned; an [ErrorCloser] gets CloseWithError instead.
//
// An error that is or wraps a [wire.Errno] or a [syscall.Errno] is sent to the client if
// the protocol has it, any other error as NBD_EIO. The log gets the whole error. If a
// method panics, the request fails with NBD_EIO, or the connection is closed; the server
// goes on.
type Device interface {
	io.ReaderAt
	Size() int64
	Close() error
}

// BlockSizer is a Device with size constraints, section "Size constraints": the minimum
// and the preferred block size and the maximum payload of a request, in bytes. Zero means
// the default, which is 1, 4096 and 32 MiB. Invalid values are replaced by the nearest
// valid ones. It is asked once, when the export is opened.
type BlockSizer interface {
	BlockSizes() (minimum, preferred, maxPayload uint32)
}

// Writer is a Device that can be written to. A Device that is no Writer is served
// read-only, even if it has methods of the interfaces below.
//
// WriteAt stores all bytes or returns an error. It is called concurrently with itself and
// with all other methods, for ranges inside [0, Size), at any alignment that the minimum
// block size allows. It may return before the bytes are on stable storage: see [Flusher],
// [FUAWriter] and [WriteThrough]. Once it has returned, ReadAt must return the new bytes,
// on this connection. For other connections see [MultiConner].
//
// If requests that overlap are in flight at the same time, the result is not defined; the
// protocol leaves it to the client to avoid this.
type Writer interface {
	Device
	io.WriterAt
}

// Flusher is a [Writer] that can put changes on stable storage, section "NBD_CMD_FLUSH".
//
// When Flush returns nil, every change whose WriteAt, Trim or WriteZeroes returned before
// the call is on stable storage. It is called concurrently with all other methods. The
// server calls it for NBD_CMD_FLUSH, and, unless the device is a [FUAWriter], before the
// reply to a request with NBD_CMD_FLAG_FUA.
//
// A Writer that is neither a Flusher nor a [WriteThrough] cannot promise that anything
// is on stable storage, so the server advertises neither NBD_FLAG_SEND_FLUSH nor
// NBD_FLAG_SEND_FUA for it, and refuses both with NBD_EINVAL.
type Flusher interface {
	Flush() error
}

// FUAWriter is a [Writer] that can put one change on stable storage without flushing
// every other change. Its methods are WriteAt, Trim and WriteZeroes, except that they return
// when the change is on stable storage. The server calls them for requests with
// NBD_CMD_FLAG_FUA; for a Writer without them it calls the method without FUA and then
// Flush. TrimFUA is called only if the device is a [Trimmer], WriteZeroesFUA only if it
// is a [ZeroWriter].
type FUAWriter interface {
	WriteFUA(p []byte, off int64) error
	TrimFUA(off, n int64) error
	WriteZeroesFUA(off, n int64, noHole, fast bool) error
}

// WriteThrough is a [Writer] without Flush whose WriteAt, Trim and WriteZeroes return only
// when the change is on stable storage. If WritesThrough returns true, the server
// advertises FLUSH and FUA, for which it has nothing to do. It is asked once, when the
// export is opened.
type WriteThrough interface {
	WritesThrough() bool
}

// Trimmer is a [Writer] that can free the storage of a range, section "NBD_CMD_TRIM". The
// content of the range is undefined afterwards. It is called concurrently with all other
// methods, never with a length of 0.
type Trimmer interface {
	Trim(off, n int64) error
}

// ZeroWriter is a [Writer] that can zero a range faster than by writing zeroes, section
// "NBD_CMD_WRITE_ZEROES". Without it the server writes zeroes with WriteAt.
//
// With noHole the range must stay allocated. With fast the call must be much faster than
// writing zeroes; if it cannot be, it must fail at once with an error that matches
// [wire.ENOTSUP] or syscall.ENOTSUP, and change nothing. It is called concurrently with
// all other methods, never with a length of 0.
type ZeroWriter interface {
	WriteZeroes(off, n int64, noHole, fast bool) error
}

// Cacher is a Device that can prepare for reads of a range, section "NBD_CMD_CACHE". It
// may do nothing. It is called concurrently, never with a length of 0.
type Cacher interface {
	Cache(off, n int64) error
}

// Extenter is a Device that knows which of its ranges are holes or read as zeroes, for the
// metadata context base:allocation, and so that the server need not read them. Without it
// all of the export counts as allocated data.
//
// The first extent begins at off, and each other one where the one before it ends. All
// lengths are above 0. There is at least one; the last may end before or after off+n, but
// not after Size. Extents is called concurrently.
type Extenter interface {
	Extents(off, n int64) ([]wire.Extent, error)
}

// DataRunner is an [Extenter] that knows its holes without asking the storage, so that the
// server can ask before every READ, however short it is. With [FileBacked] that matters:
// where there is a hole the server does not even look into the page cache, because that
// makes the kernel read the hole from storage.
//
// DataRun reports whether the byte at off counts as data, and how many of the n bytes from
// off on are like it, at least one. Ranges without data read as zeroes. The range is within
// Size and n is above 0. DataRun is called concurrently.
type DataRunner interface {
	Extenter
	DataRun(off, n int64) (data bool, length int64)
}

// MultiConner is a [Writer] that can promise the coherence of NBD_FLAG_CAN_MULTI_CONN: a
// change that was flushed on one connection is read on every other one. Read-only devices
// need no promise. It is asked once, when the export is opened.
type MultiConner interface {
	MultiConn() bool
}

// Capable is a Device that has more methods than it can serve. A proxy, for example,
// has the methods of every capability, but serves only those of the device behind it.
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

// Describer is a Device with a description for people (NBD_INFO_DESCRIPTION): at most 4096
// bytes of UTF-8 without NUL. It is asked once, when the export is opened.
type Describer interface {
	Description() string
}

// Namer is a Device with a canonical name (NBD_INFO_NAME), which may differ from the name
// that the client asked for. The canonical name must not be secret: it is logged. Devices
// with the same canonical name are one device when the memory of [Limits].MaxInflightBytes
// is shared. Without it clients get the name that they asked for, and the log has no name.
type Namer interface {
	CanonicalName() string
}

// Revocable is a Device that can become unusable while a client uses it, for example
// because the disk was unplugged or because the client's session was logged out.
//
// The server calls Lifetime once, when the transmission phase begins. When that context
// is done, the server starts no further request, waits up to a second for the replies
// to the requests in flight, and closes the device and the connection. A client with simple
// replies gets NBD_ESHUTDOWN for what it still sends until its NBD_CMD_DISC, for up to two
// seconds, before the connection is closed. [context.Cause] is the reason; it is logged, so
// it must hold no secrets. Calls that are running then should fail soon: the device is
// closed only when all of them have returned. A nil context means that this device is never
// revoked.
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

// blockSizesOf returns the size constraints of a device, corrected by the rules of section
// "Size constraints".
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
