package vhdtest

import (
	"encoding/binary"
	"errors"
	"io"
	"slices"
)

// WriteSectors writes to the disk as a guest does. off and the length of p are multiples of
// 512. If the image does not have the block, WriteSectors adds it at the end, before the
// trailing footer; only the written sectors of it belong to this image. The order is that of
// tapdisk: data, sector bitmap, table entry.
func (img *Image) WriteSectors(p []byte, off int64) error {
	for len(p) > 0 {
		at := off % BlockSize
		n := min(int64(len(p)), BlockSize-at)
		if err := img.writeInBlock(p[:n], off/BlockSize, at); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// writeInBlock writes p at the offset at of one block.
func (img *Image) writeInBlock(p []byte, block, at int64) error {
	bitmapAt, bitmap, err := img.bitmap(block)
	if err != nil {
		return err
	}
	isNew := bitmap == nil
	if isNew {
		bitmapAt, bitmap = img.next, make([]byte, sector)
		img.next += sector + BlockSize
		footer, err := img.read(sector, 0)
		if err == nil {
			err = img.write(footer, img.next)
		}
		if err != nil {
			return err
		}
	}
	for i := at / sector; i < (at+int64(len(p)))/sector; i++ {
		bitmap[i/8] |= 0x80 >> (i % 8)
	}
	err = img.write(p, bitmapAt+sector+at)
	if err == nil {
		err = img.write(bitmap, bitmapAt)
	}
	if err == nil && isNew {
		err = img.writeEntry(block, bitmapAt)
	}
	return err
}

// bitmap returns the sector bitmap of a block and where it is, or nil if the image does
// not have the block.
func (img *Image) bitmap(block int64) (at int64, bitmap []byte, err error) {
	has, err := img.HasBlock(block)
	if err != nil || !has {
		return 0, nil, err
	}
	entry, err := img.read(4, tableAt+block*4)
	if err != nil {
		return 0, nil, err
	}
	at = int64(binary.BigEndian.Uint32(entry)) * sector
	bitmap, err = img.read(sector, at)
	return at, bitmap, err
}

// EachRun calls do for each run of sectors that this image has in a block, with the
// data and its offset in the disk. data is valid during the call.
func (img *Image) EachRun(block int64, do func(data []byte, off int64) error) error {
	at, bitmap, err := img.bitmap(block)
	if err != nil {
		return err
	}
	has := func(i int64) bool { return bitmap != nil && bitmap[i/8]&(0x80>>(i%8)) != 0 }
	const sectors = BlockSize / sector
	for from := int64(0); from < sectors; from++ {
		to := from
		for to < sectors && has(to) {
			to++
		}
		if to == from {
			continue
		}
		data, err := img.read(int((to-from)*sector), at+sector+from*sector)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if err := do(data, block*BlockSize+from*sector); err != nil {
			return err
		}
		from = to
	}
	return nil
}

// ReadChain reads one block of the disk of a chain of images, with the uppermost image
// first. Sectors that no image has are zeroes.
func ReadChain(chain []*Image, block int64) ([]byte, error) {
	content := make([]byte, BlockSize)
	for _, img := range slices.Backward(chain) {
		err := img.EachRun(block, func(data []byte, off int64) error {
			copy(content[off-block*BlockSize:], data)
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return content, nil
}
