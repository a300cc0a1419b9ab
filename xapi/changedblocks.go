package xapi

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"

	"xapi-nbd/xapi/internal/xmlrpc"
)

// The codes of changed block tracking (CBT) beside VDIInUse, which says that the newer
// VDI of VDI.list_changed_blocks is attached.
const (
	// SROperationNotSupported: the SR has no changed block tracking.
	SROperationNotSupported ErrorCode = "SR_OPERATION_NOT_SUPPORTED"
	// CBTMetadataInconsistent: the logs of the two VDIs contradict each other.
	CBTMetadataInconsistent ErrorCode = "SR_BACKEND_FAILURE_459"
	// CBTChangedBlocksFailed: the storage manager has no answer. The second parameter
	// says why: the VDIs are unrelated, are the same, or have no log.
	CBTChangedBlocksFailed ErrorCode = "SR_BACKEND_FAILURE_460"
)

// ChangedBlockSize is the size in bytes of a block of ChangedBlocks.
const ChangedBlockSize = 64 << 10

// maxChangedDisk is the largest disk whose changed blocks can be asked for. XCP-ng has
// disks of up to 16,381 GiB.
const maxChangedDisk = 16 << 40

// ListChangedBlocks asks which blocks were written to between the VDI base and the VDI
// this, both snapshots of one disk, base the older one (VDI.list_changed_blocks). size
// is the size of this in bytes, from its record, and at most 16 TiB. It decides how much
// memory is needed: 2 MiB for each TiB. The bitmap is decoded while it arrives.
//
// xapi refuses with VDIInUse while this is attached anywhere, and waits, for hours if
// need be, while a VBD of it is being plugged or unplugged. So the caller bounds ctx;
// without a deadline, Config.MutateTimeout is the bound. An answer that does not fit
// size or is no bitmap is a *TransportError that matches ErrAnswer. xapi changes
// nothing by this call.
func (s *Session) ListChangedBlocks(ctx context.Context, base, this VDIRef, size int64) (*ChangedBlocks, error) {
	const method = "VDI.list_changed_blocks"
	if size <= 0 || size > maxChangedDisk {
		return nil, fmt.Errorf("xapi: %s: %w: a disk of %d bytes", method, ErrArgument, size)
	}
	ref := string(*s.ref)
	q := request{method: method, secret: ref, timeout: s.c.cfg.MutateTimeout, params: []any{ref, string(base), string(this)}}
	changed := &ChangedBlocks{size: size}
	_, err := invokeWith(ctx, s.c, q, func(body io.Reader) (xmlrpc.Reply[string], error) {
		limit := int(min(s.c.cfg.MaxResponseBytes, maxLongReply))
		return xmlrpc.DecodeLongText(body, limit, func(text io.Reader) (err error) {
			changed.bitmap, err = decodeBitmap(text, size)
			return err
		})
	})
	if err != nil {
		return nil, err
	}
	return changed, nil
}

// maxLongReply bounds, in bytes, the part of a reply that is not the bitmap. The longest is
// the error of a storage manager, with its standard error.
const maxLongReply = 1 << 20

// The errors of decodeBitmap. They repeat nothing of the text.
var (
	errNotBase64   = errors.New("the bitmap is not in base64")
	errLongBitmap  = errors.New("the bitmap is longer than the disk")
	errShortBitmap = errors.New("the bitmap is shorter than the disk")
)

// decodeBitmap reads a bitmap in base64, as it stands in a reply: with padding, without
// line breaks. It has one bit for each block of a disk of size bytes. The storage
// manager also accepts logs without a bit for an incomplete last block, so the last
// byte may be missing if it had that bit only.
func decodeBitmap(text io.Reader, size int64) ([]byte, error) {
	complete := size / ChangedBlockSize
	blocks := (size + ChangedBlockSize - 1) / ChangedBlockSize
	shortest, longest := int((complete+7)/8), int((blocks+7)/8)

	bitmap := make([]byte, 0, longest)
	buf := make([]byte, 64<<10) // a multiple of the 4 characters that are decoded together
	decoded := make([]byte, base64.StdEncoding.DecodedLen(len(buf)))
	for {
		n, err := io.ReadFull(text, buf)
		// A reply that ends too early gives io.ErrUnexpectedEOF too. Then the part after the
		// text is missing, which fails the reply.
		last := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		if err != nil && !last {
			return nil, err
		}
		got, decodeErr := base64.StdEncoding.Strict().Decode(decoded, buf[:n])
		switch {
		case decodeErr != nil, bytes.ContainsAny(buf[:n], "\r\n"), !last && got < len(decoded):
			return nil, errNotBase64
		case len(bitmap)+got > longest:
			return nil, errLongBitmap
		}
		bitmap = append(bitmap, decoded[:got]...)
		if last {
			break
		}
	}
	if len(bitmap) < shortest {
		return nil, errShortBitmap
	}
	return bitmap, nil
}

// ChangedBlocks says which blocks of 64 KiB of a disk were written to between two
// snapshots. A block that was written to need not have other content. It is immutable,
// and needs 2 MiB of memory for each TiB.
type ChangedBlocks struct {
	size   int64
	bitmap []byte // the most significant bit first; a missing bit is 1
}

// NewChangedBlocks returns the changed blocks of a disk of size bytes, from a bitmap in
// the form of VDI.list_changed_blocks: the first block is the most significant bit of
// the first byte. A block that the bitmap does not cover has changed. The bitmap must
// not be changed later.
func NewChangedBlocks(size int64, bitmap []byte) *ChangedBlocks {
	return &ChangedBlocks{size: size, bitmap: bitmap}
}

// Size is the size of the disk in bytes.
func (c *ChangedBlocks) Size() int64 { return c.size }

// Run reports whether the block at off has changed, and how many bytes from off on are
// like it: up to limit bytes, or to the end of the disk. off is in [0, Size) and limit
// is above 0.
func (c *ChangedBlocks) Run(off, limit int64) (changed bool, n int64) {
	limit = min(limit, c.size-off)
	block := off / ChangedBlockSize
	changed = c.word(block)>>63 == 1
	for end := block + 1; end*ChangedBlockSize-off < limit; {
		// Zeroes in word are blocks like the first one, from the first bit on.
		word, inWord := c.word(end), 64-end%64
		if changed {
			word = ^word
		}
		same := int64(bits.LeadingZeros64(word))
		if same < inWord {
			return changed, min((end+same)*ChangedBlockSize-off, limit)
		}
		end += inWord
	}
	return changed, limit
}

// word returns the bits of 64 blocks from the 64 that hold block, moved so that the bit
// of block is the first.
func (c *ChangedBlocks) word(block int64) uint64 {
	var b [8]byte
	at := block / 64 * 8
	var covered int
	if at < int64(len(c.bitmap)) {
		covered = copy(b[:], c.bitmap[at:])
	}
	for i := covered; i < len(b); i++ {
		b[i] = 0xff
	}
	return binary.BigEndian.Uint64(b[:]) << (block % 64)
}

// ChangedFrom returns the same changed blocks, and beside them all blocks from the one at
// off on.
func (c *ChangedBlocks) ChangedFrom(off int64) *ChangedBlocks {
	block := off / ChangedBlockSize
	whole := int(block / 8)
	if off >= c.size || whole >= len(c.bitmap) {
		return c
	}
	bitmap := c.bitmap[:whole:whole] // bits behind the end count as changed
	if before := block % 8; before > 0 {
		bitmap = append(bitmap, c.bitmap[whole]|0xff>>before)
	}
	return &ChangedBlocks{size: c.size, bitmap: bitmap}
}

// Bytes is how many bytes of the disk are in changed blocks.
func (c *ChangedBlocks) Bytes() int64 {
	blocks := (c.size + ChangedBlockSize - 1) / ChangedBlockSize
	var changed int64
	for block := int64(0); block < blocks; block += 64 {
		behind := 64 - min(64, blocks-block)
		changed += int64(bits.OnesCount64(c.word(block) >> behind))
	}
	n := changed * ChangedBlockSize
	if last := blocks - 1; c.size > 0 && c.word(last)>>63 == 1 {
		n -= blocks*ChangedBlockSize - c.size
	}
	return n
}
