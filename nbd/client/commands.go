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

// ZeroOptions modify WriteZeroes, section "NBD_CMD_WRITE_ZEROES".
type ZeroOptions struct {
	NoHole bool // the range stays allocated
	Fast   bool // fail with [wire.ENOTSUP] rather than be as slow as writing
	FUA    bool // on stable storage before the return
}

// Read fills p from off on. The whole range must be inside the export. Reads
// that the server's size constraints do not allow are split, or widened to whole
// blocks.
func (c *Conn) Read(ctx context.Context, p []byte, off int64) error {
	if err := c.inside(wire.CmdRead, off, int64(len(p))); err != nil {
		return err
	}
	_, err := c.read(ctx, p, off)
	return err
}

// ReadAt implements [io.ReaderAt] with Read: at the end of the export there is
// less, and io.EOF.
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

// widen rounds a range to whole blocks. The last one of the export may be cut.
func (c *Conn) widen(off, end, unit int64) (int64, int64) {
	begin := off / unit * unit
	if rest := end % unit; rest != 0 {
		end += min(unit-rest, c.Size()-end)
	}
	return begin, end
}

// BlockSizes are the sizes that the client keeps to. They are those of
// [Conn.Info] where the server keeps to section "Size constraints" of the
// protocol: a minimum that is a power of two up to 65536, a preferred size that is
// a power of two, of 512 bytes and the minimum at least, a maximum payload that is
// a multiple of the minimum and not below the preferred size. What is against
// that, or not advertised, is replaced: the minimum by 1, the preferred size by
// 4096 or the minimum, a maximum below 512 bytes or the minimum by the preferred
// size. A maximum is rounded down to a multiple of the minimum, and is 32 MiB at
// most; a preferred size above it is lowered to it.
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

// constraints are the unit of requests and the length of the longest, a multiple
// of it.
func (c *Conn) constraints() (unit, limit int64) {
	s := c.BlockSizes()
	return int64(s.Min), int64(max(s.MaxPayload, s.Min))
}

// readBlocks requests [begin, end) and gives p what it wants of that, from at
// on. Where the two are the same nothing is copied.
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

// Write stores p from off on, with fua on stable storage before it returns.
// The range must be inside the export and consist of whole blocks if the server
// has a minimum block size: nothing is read to be written back. Large writes are
// split.
func (c *Conn) Write(ctx context.Context, p []byte, off int64, fua bool) error {
	_, err := c.writeBlocks(ctx, p, off, fua)
	return err
}

// WriteAt implements [io.WriterAt] with Write, without FUA.
func (c *Conn) WriteAt(p []byte, off int64) (int, error) {
	return c.writeBlocks(context.Background(), p, off, false)
}

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

// Flush puts everything on stable storage whose write was answered before.
func (c *Conn) Flush(ctx context.Context) error {
	if err := c.advertised(wire.CmdFlush, wire.FlagSendFlush); err != nil {
		return err
	}
	return c.roundTrip(ctx, &call{req: wire.Request{Command: wire.CmdFlush}}, nil)
}

// Trim tells the server that n bytes from off on are not needed any more. What
// they read as afterwards is not defined. Only whole blocks can be trimmed.
func (c *Conn) Trim(ctx context.Context, off, n int64, fua bool) error {
	flags, err := c.changes(wire.CmdTrim, wire.FlagSendTrim, off, n, fua)
	if err != nil {
		return err
	}
	return c.noPayload(ctx, wire.CmdTrim, flags, off, n)
}

// WriteZeroes makes n bytes from off on read as zeroes. Only whole blocks can be
// zeroed.
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

// Cache tells the server that n bytes from off on will be read soon.
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

// maxCompactLength is the longest range of a request without payload and
// without extended headers: what 32 bits can say, in whole blocks of any size.
const maxCompactLength = 1<<32 - wire.MaxMinBlock

func (c *Conn) lengthLimit() int64 {
	if c.mode == extendedHeaders {
		return math.MaxInt64 - math.MaxInt64%wire.MaxMinBlock
	}
	return maxCompactLength
}

// noPayload sends as many requests as the range needs.
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

// advertised fails unless the server has said that it knows the command, or
// what of it the flag stands for.
func (c *Conn) advertised(cmd wire.Command, flag wire.TransmissionFlags) error {
	if c.info.Flags&flag != flag {
		return fmt.Errorf("%v: %v is %w", cmd, flag, ErrUnsupported)
	}
	return nil
}

// changes checks a command that changes the export before anything is sent, and
// makes its flags.
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

// inside fails unless the range is inside the export, section "Size
// constraints".
func (c *Conn) inside(cmd wire.Command, off, n int64) error {
	if off < 0 || n < 0 || off > c.Size()-n {
		return fmt.Errorf("%v: %d bytes at %d are outside the export of %d: %w", cmd, n, off, c.Size(), wire.EINVAL)
	}
	return nil
}
