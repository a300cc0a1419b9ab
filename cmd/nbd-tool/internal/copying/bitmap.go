package copying

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"

	"xapi-nbd/cmd/nbd-tool/internal/extents"
	"xapi-nbd/nbd/wire"
)

// bitmapBlock is how many bytes one bit of a bitmap stands for.
const bitmapBlock = 64 << 10

// Bitmap returns the changes in the result of the Xen API's VDI.list_changed_blocks for a
// disk of size bytes: one bit for each block of 64 KiB, the most significant bit of the first
// byte for the first block. text is the result in base64, as the API returns it and xe prints
// it, or the bytes themselves. A bitmap of another length is an error, but the last byte may
// be missing if it stands for an incomplete block only; that block counts as changed.
func Bitmap(text []byte, size int64) (*Changes, error) {
	bits, err := decodeBitmap(text, size)
	if err != nil {
		return nil, err
	}
	changed := func(block int64) bool {
		return block/8 >= int64(len(bits)) || bits[block/8]&(0x80>>(block%8)) != 0
	}
	ask := func(ctx context.Context, off, n int64) ([]wire.Extent, error) {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		block := off / bitmapBlock
		state := changed(block)
		last := (off + n - 1) / bitmapBlock
		for block < last && changed(block+1) == state {
			block++
		}
		e := wire.Extent{Length: uint64(min((block+1)*bitmapBlock, size) - off)}
		if state {
			e.Status = extents.StateDirty
		}
		return []wire.Extent{e}, nil
	}
	return &Changes{ask: ask, kindOf: kindOfDirty, changed: extents.StateDirty}, nil
}

// decodeBitmap returns the bytes of a bitmap for a disk of size bytes.
func decodeBitmap(text []byte, size int64) ([]byte, error) {
	longest := int((size + 8*bitmapBlock - 1) / (8 * bitmapBlock))
	shortest := int((size/bitmapBlock + 7) / 8)
	fits := func(b []byte) bool { return len(b) >= shortest && len(b) <= longest }
	bits, err := base64.StdEncoding.Strict().DecodeString(string(bytes.TrimSpace(text)))
	isBase64 := err == nil && len(bits) > 0
	switch {
	case isBase64 && fits(bits):
		return bits, nil
	case fits(text) && isBase64 && len(bits) >= 48:
		// Such a text is hardly ever a bitmap, and the wrong one would leave out blocks.
		return nil, fmt.Errorf("the bitmap can be read as the base64 of %d bytes, which is one of another disk, or as %d bytes; give it in base64", len(bits), len(text))
	case fits(text):
		return text, nil
	case isBase64:
		return nil, fmt.Errorf("the bitmap has %d bytes, but a disk of %d bytes has one of %d", len(bits), size, longest)
	}
	return nil, fmt.Errorf("the bitmap has %d bytes and is not base64; a disk of %d bytes has one of %d", len(text), size, longest)
}
