package client

import (
	"context"
	"fmt"
	"io"
	"math"

	"xapi-nbd/nbd/wire"
)

var (
	_ io.ReaderAt = (*Conn)(nil)
	_ io.WriterAt = (*Conn)(nil)
)

// ZeroOptions are the options of [Conn.WriteZeroes], section "NBD_CMD_WRITE_ZEROES".
type ZeroOptions struct {
	NoHole bool // the range must stay allocated
	Fast   bool // fail with [wire.ENOTSUP] if zeroing would be as slow as writing
	FUA    bool // the zeroes must be on stable storage before the call returns
}

// Read fills p with the bytes of the export from off on. The whole range must be inside the
// export. Ranges that the server's size constraints do not allow are split into several
// requests, or extended to whole blocks.
func (c *Conn) Read(ctx context.Context, p []byte, off int64) error {
	if err := c.inside(wire.CmdRead, off, int64(len(p))); err != nil {
		return err
	}
	_, err := c.read(ctx, p, off)
	return err
}

// ReadAt implements [io.ReaderAt] by means of Read. A range that goes past the end of the
// export returns fewer bytes and io.EOF.
func (c *Conn) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("%v: negative offset: %w", wire.CmdRead, wire.EINVAL)
	}
	want := len(p)
	if rest := c.Size() - off; int64(want) > rest {
		p = p[:max(rest, 0)]
	}
	n, err := c.read(context.Background(), p, off)
	if err == nil && n < want {
		err = io.EOF
	}
	return n, err
}

// read is Read for a range that may go past the end of the export. It returns the number of
// bytes before the first error.
func (c *Conn) read(ctx context.Context, p []byte, off int64) (n int, err error) {
	unit, limit := c.constraints()
	for n < len(p) {
		at := off + int64(n)
		begin, end := c.widen(at, off+int64(len(p)), unit)
		got, err := c.readBlocks(ctx, p[n:], at, begin, begin+min(end-begin, limit))
		n += got
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// widen extends a range to whole blocks. The last block of the export may be shorter.
func (c *Conn) widen(off, end, unit int64) (int64, int64) {
	begin := off / unit * unit
	if rest := end % unit; rest != 0 {
		end += min(unit-rest, c.Size()-end)
	}
	return begin, end
}

// BlockSizes returns the size constraints in bytes that the client observes. They are those
// of [Conn.Info], as far as these are valid by section "Size constraints": the minimum is a
// power of two up to 65536; the preferred size is a power of two and at least 512 and the
// minimum; the maximum payload is a multiple of the minimum and at least the preferred size.
//
// Sizes that are invalid or not advertised are replaced: the minimum by 1; the preferred
// size by 4096 or the minimum, whichever is larger; a maximum below 512 or the minimum by
// the preferred size. The maximum is rounded down to a multiple of the minimum and is at
// most 32 MiB; a preferred size above the maximum is lowered to it.
func (c *Conn) BlockSizes() wire.BlockSizes {
	s := c.info.BlockSizes
	if s.Min > wire.MaxMinBlock || !isPowerOf2(s.Min) {
		s.Min = 1
	}
	if !isPowerOf2(s.Preferred) || s.Preferred < max(s.Min, wire.MinPreferredBlock) || s.Preferred > wire.DefaultMaxPayload {
		s.Preferred = max(s.Min, wire.DefaultPreferredBlock)
	}
	if s.MaxPayload == 0 || s.MaxPayload > wire.DefaultMaxPayload {
		s.MaxPayload = wire.DefaultMaxPayload
	}
	s.MaxPayload = s.MaxPayload / s.Min * s.Min
	if uint64(s.MaxPayload) < min(uint64(wire.MinPreferredBlock), max(c.info.Size, 1)) {
		s.MaxPayload = s.Preferred
	}
	for s.Preferred > max(s.MaxPayload, s.Min, wire.MinPreferredBlock) {
		s.Preferred /= 2
	}
	return s
}

func isPowerOf2(v uint32) bool { return v != 0 && v&(v-1) == 0 }

// constraints returns the block size of requests, and the length of the longest request
// with data, which is a multiple of it.
func (c *Conn) constraints() (unit, limit int64) {
	s := c.BlockSizes()
	return int64(s.Min), int64(max(s.MaxPayload, s.Min))
}

// readBlocks reads [begin, end), which contains at, and puts the bytes from at on into p. It
// returns how many. If p is exactly that range, nothing is copied.
func (c *Conn) readBlocks(ctx context.Context, p []byte, at, begin, end int64) (int, error) {
	n := int(min(int64(len(p)), end-at))
	blocks := p[:n]
	exact := begin == at && end-begin == int64(n)
	if !exact {
		blocks = make([]byte, end-begin)
	}
	r := wire.Request{Command: wire.CmdRead, Offset: uint64(begin), Length: uint64(end - begin)}
	if err := c.roundTrip(ctx, &call{req: r, p: blocks}, nil); err != nil {
		return 0, err
	}
	if !exact {
		copy(p[:n], blocks[at-begin:])
	}
	return n, nil
}

// Write writes p to the export from off on. If fua is true, the data is on stable storage
// before Write returns; otherwise [Conn.Flush] makes sure of that. The range must be inside
// the export and consist of whole blocks of [Conn.BlockSizes].Min bytes, because Write does
// not read the rest of a block in order to write it back. Large writes are split into
// several requests.
func (c *Conn) Write(ctx context.Context, p []byte, off int64, fua bool) error {
	_, err := c.writeBlocks(ctx, p, off, fua)
	return err
}

// WriteAt implements [io.WriterAt] by means of Write without FUA.
func (c *Conn) WriteAt(p []byte, off int64) (int, error) {
	return c.writeBlocks(context.Background(), p, off, false)
}

// writeBlocks is Write. It returns the number of bytes before the first error.
func (c *Conn) writeBlocks(ctx context.Context, p []byte, off int64, fua bool) (n int, err error) {
	flags, err := c.changes(wire.CmdWrite, 0, off, int64(len(p)), fua)
	if err != nil {
		return 0, err
	}
	_, limit := c.constraints()
	for n < len(p) {
		piece := p[n:min(len(p), n+int(limit))]
		r := wire.Request{Command: wire.CmdWrite, Flags: flags, Offset: uint64(off) + uint64(n), Length: uint64(len(piece))}
		if err := c.roundTrip(ctx, &call{req: r}, piece); err != nil {
			return n, err
		}
		n += len(piece)
	}
	return n, nil
}

// Flush puts all changes on stable storage whose calls have returned before, section
// "NBD_CMD_FLUSH". If the server promises NBD_FLAG_CAN_MULTI_CONN, that includes changes
// over other connections to the export.
func (c *Conn) Flush(ctx context.Context) error {
	if err := c.advertised(wire.CmdFlush, wire.FlagSendFlush); err != nil {
		return err
	}
	return c.roundTrip(ctx, &call{req: wire.Request{Command: wire.CmdFlush}}, nil)
}

// Trim tells the server that the n bytes from off on are not needed any more, section
// "NBD_CMD_TRIM". Afterwards they may have any content. The range must consist of whole
// blocks, as for [Conn.Write].
func (c *Conn) Trim(ctx context.Context, off, n int64, fua bool) error {
	flags, err := c.changes(wire.CmdTrim, wire.FlagSendTrim, off, n, fua)
	if err != nil {
		return err
	}
	return c.noPayload(ctx, wire.CmdTrim, flags, off, n)
}

// WriteZeroes makes the n bytes from off on zeroes, section "NBD_CMD_WRITE_ZEROES". The
// range must consist of whole blocks, as for [Conn.Write].
func (c *Conn) WriteZeroes(ctx context.Context, off, n int64, z ZeroOptions) error {
	flags, err := c.changes(wire.CmdWriteZeroes, wire.FlagSendWriteZeroes, off, n, z.FUA)
	if err != nil {
		return err
	}
	if z.NoHole {
		flags |= wire.CmdFlagNoHole
	}
	if z.Fast {
		if err := c.advertised(wire.CmdWriteZeroes, wire.FlagSendFastZero); err != nil {
			return err
		}
		flags |= wire.CmdFlagFastZero
	}
	return c.noPayload(ctx, wire.CmdWriteZeroes, flags, off, n)
}

// Cache tells the server that the n bytes from off on will be read soon, section
// "NBD_CMD_CACHE".
func (c *Conn) Cache(ctx context.Context, off, n int64) error {
	if err := c.advertised(wire.CmdCache, wire.FlagSendCache); err != nil {
		return err
	}
	if err := c.inside(wire.CmdCache, off, n); err != nil || n == 0 {
		return err
	}
	unit, _ := c.constraints()
	begin, end := c.widen(off, off+n, unit)
	return c.noPayload(ctx, wire.CmdCache, 0, begin, end-begin)
}

// maxCompactLength is the longest range in bytes of a request without payload if extended
// headers were not negotiated: the largest 32-bit number that is a multiple of every block
// size.
const maxCompactLength = 1<<32 - wire.MaxMinBlock

// lengthLimit returns the longest range in bytes of a request without payload.
func (c *Conn) lengthLimit() int64 {
	if c.mode == extendedHeaders {
		return math.MaxInt64 - math.MaxInt64%wire.MaxMinBlock
	}
	return maxCompactLength
}

// noPayload sends a command without payload, in as many requests as the range needs.
func (c *Conn) noPayload(ctx context.Context, cmd wire.Command, flags wire.CommandFlags, off, n int64) error {
	for n > 0 {
		piece := min(n, c.lengthLimit())
		r := wire.Request{Command: cmd, Flags: flags, Offset: uint64(off), Length: uint64(piece)}
		if err := c.roundTrip(ctx, &call{req: r}, nil); err != nil {
			return err
		}
		off, n = off+piece, n-piece
	}
	return nil
}

// advertised fails with ErrUnsupported unless the server advertises the flags, which stand
// for the command or an option of it.
func (c *Conn) advertised(cmd wire.Command, flag wire.TransmissionFlags) error {
	if c.info.Flags&flag != flag {
		return fmt.Errorf("%v: %v is %w", cmd, flag, ErrUnsupported)
	}
	return nil
}

// changes checks a command that changes the export, before it is sent, and returns its
// flags.
func (c *Conn) changes(cmd wire.Command, flag wire.TransmissionFlags, off, n int64, fua bool) (flags wire.CommandFlags, err error) {
	if c.info.Flags&wire.FlagReadOnly != 0 {
		return 0, fmt.Errorf("%v: the export is read-only, writing is %w", cmd, ErrUnsupported)
	}
	if fua {
		flag |= wire.FlagSendFUA
		flags |= wire.CmdFlagFUA
	}
	if err := c.advertised(cmd, flag); err != nil {
		return 0, err
	}
	if err := c.inside(cmd, off, n); err != nil {
		return 0, err
	}
	unit, _ := c.constraints()
	if off%unit != 0 || (off+n)%unit != 0 && off+n != c.Size() {
		return 0, fmt.Errorf("%v: %d bytes at %d are not aligned to the server's minimum block of %d bytes: %w", cmd, n, off, unit, wire.EINVAL)
	}
	return flags, nil
}

// inside fails unless the range is inside the export, section "Size constraints".
func (c *Conn) inside(cmd wire.Command, off, n int64) error {
	if off < 0 || n < 0 || off > c.Size()-n {
		return fmt.Errorf("%v: %d bytes at %d are outside the export of %d: %w", cmd, n, off, c.Size(), wire.EINVAL)
	}
	return nil
}
