package vhdtest

import (
	"encoding/binary"
	"errors"
	"io"
)

// Storage holds an image.
type Storage interface {
	io.ReaderAt
	io.WriterAt
}

// BlockSize is the size of a block in bytes.
const BlockSize = 2 << 20

// The layout of the images: footer copy, header, parent locator, table, batmap, blocks.
const (
	sector        = 512
	headerAt      = 512
	locatorAt     = 1536
	locatorLength = 1024
	tableAt       = locatorAt + locatorLength
)

// Options describe a new image.
type Options struct {
	Size   int64 // of the disk in bytes, a multiple of BlockSize
	UUID   [16]byte
	Hidden bool // a base copy

	// OriginalSize is the size before the last resize; 0 means Size.
	OriginalSize int64
	// ReservedEntries is the number of entries of the table; 0 means the number of blocks
	// of the disk. On LVM, SM reserves 1,048,576.
	ReservedEntries int

	// Differencing makes an image with a parent: one with the UUID ParentUUID, or a raw
	// one if that is zero, under the name ParentName in the same folder.
	Differencing bool
	ParentUUID   [16]byte
	ParentName   string
}

// Image writes an image. It is not safe for concurrent use.
type Image struct {
	s       Storage
	entries int64
	next    int64 // offset of the next new block
}

// Create writes an image without any block and returns a writer for it.
func Create(s Storage, o Options) (*Image, error) {
	entries := max(int64(o.ReservedEntries), o.Size/BlockSize)
	img := &Image{s: s, entries: entries}
	tableEnd := tableAt + roundUp(entries*4)
	img.next = tableEnd + sector + roundUp((entries+7)/8) // behind the batmap
	table := make([]byte, tableEnd-tableAt)
	for i := range table {
		table[i] = 0xff
	}
	batmap := make([]byte, sector)
	copy(batmap, "tdbatmap")
	putUint64(batmap, 8, uint64(tableEnd+sector))
	putUint32(batmap, 16, uint32((entries+8*sector-1)/(8*sector)))
	putUint32(batmap, 20, 0x00010002)
	footer := newFooter(o)
	return img, errors.Join(
		img.write(table, tableAt), img.write(batmap, tableEnd),
		img.write(newLocator(o.ParentName), locatorAt), img.write(newHeader(o, entries), headerAt),
		img.write(footer, 0), img.write(footer, img.next))
}

func newFooter(o Options) []byte {
	b := make([]byte, sector)
	copy(b, "conectix")
	putUint32(b, 8, 2)
	putUint32(b, 12, 0x00010000)
	putUint64(b, 16, headerAt)
	copy(b[28:], "tap\x00")
	original := o.OriginalSize
	if original == 0 {
		original = o.Size
	}
	putUint64(b, 40, uint64(original))
	putUint64(b, 48, uint64(o.Size))
	kind := uint32(3)
	if o.Differencing {
		kind = 4
	}
	putUint32(b, 60, kind)
	copy(b[68:], o.UUID[:])
	if o.Hidden {
		b[85] = 1
	}
	seal(b, 64)
	return b
}

func newHeader(o Options, entries int64) []byte {
	b := make([]byte, 1024)
	copy(b, "cxsparse")
	putUint64(b, 8, 1<<64-1)
	putUint64(b, 16, tableAt)
	putUint32(b, 24, 0x00010000)
	putUint32(b, 28, uint32(entries))
	putUint32(b, 32, BlockSize)
	if o.Differencing {
		copy(b[40:], o.ParentUUID[:])
		copy(b[576:], "MacX")
		putUint32(b, 576+4, 512)
		putUint32(b, 576+8, uint32(len(locatorText(o.ParentName))))
		putUint64(b, 576+16, locatorAt)
	}
	seal(b, 36)
	return b
}

func newLocator(parent string) []byte {
	b := make([]byte, locatorLength)
	copy(b, locatorText(parent))
	return b
}

func locatorText(parent string) string { return "file://./" + parent }

// AddBlock adds a block at the end of the image, and writes data at its beginning. The order
// is that of tapdisk: data, sector bitmap, table entry. Each step is one write; before is
// called before each of them.
func (img *Image) AddBlock(block int64, data []byte, before func()) error {
	bitmapAt := img.next
	img.next += sector + BlockSize
	bitmap := make([]byte, sector)
	for i := range (len(data) + sector - 1) / sector {
		bitmap[i/8] |= 0x80 >> (i % 8)
	}
	before()
	if err := img.write(data, bitmapAt+sector); err != nil {
		return err
	}
	before()
	if err := img.write(bitmap, bitmapAt); err != nil {
		return err
	}
	before()
	return img.writeEntry(block, bitmapAt)
}

// MoveBlock moves a block to the end of the image, as a resize does to make room for a
// longer table.
func (img *Image) MoveBlock(block int64) error {
	at := img.next
	img.next += sector + BlockSize
	return img.writeEntry(block, at)
}

// writeEntry changes an entry of the table by writing its whole sector.
func (img *Image) writeEntry(block, bitmapAt int64) error {
	at := tableAt + block*4
	b := make([]byte, sector)
	if _, err := img.s.ReadAt(b, at&^(sector-1)); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	putUint32(b, int(at%sector), uint32(bitmapAt/sector))
	return img.write(b, at&^(sector-1))
}

// Entries returns the number of entries of the table: the largest number of blocks to which
// the disk can grow.
func (img *Image) Entries() int64 { return img.entries }

// HasBlock reports whether the image has a block.
func (img *Image) HasBlock(block int64) (bool, error) {
	if block >= img.entries {
		return false, nil
	}
	b := make([]byte, 4)
	if _, err := img.s.ReadAt(b, tableAt+block*4); err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	return binary.BigEndian.Uint32(b) != 1<<32-1, nil
}

// SetParent gives the image another parent: the locator first, then the header. before
// runs before each write.
func (img *Image) SetParent(uuid [16]byte, name string, before func()) error {
	before()
	if err := img.write(newLocator(name), locatorAt); err != nil {
		return err
	}
	b, err := img.read(1024, headerAt)
	if err != nil {
		return err
	}
	copy(b[40:], uuid[:])
	putUint32(b, 576+8, uint32(len(locatorText(name))))
	seal(b, 36)
	before()
	return img.write(b, headerAt)
}

// SetHidden marks the image as a base copy, or removes the mark.
func (img *Image) SetHidden(hidden bool) error {
	return img.editFooter(func(b []byte) {
		b[85] = 0
		if hidden {
			b[85] = 1
		}
	})
}

// SetSize changes the current size of the disk, but not its original size. The table must
// have enough entries.
func (img *Image) SetSize(size int64) error {
	return img.editFooter(func(b []byte) { putUint64(b, 48, uint64(size)) })
}

func (img *Image) editFooter(edit func(b []byte)) error {
	b, err := img.read(sector, 0)
	if err != nil {
		return err
	}
	edit(b)
	seal(b, 64)
	return errors.Join(img.write(b, 0), img.write(b, img.next))
}

func (img *Image) read(n int, off int64) ([]byte, error) {
	b := make([]byte, n)
	_, err := img.s.ReadAt(b, off)
	return b, err
}

func (img *Image) write(b []byte, off int64) error {
	_, err := img.s.WriteAt(b, off)
	return err
}

// seal writes the checksum of a footer or header to its offset at.
func seal(b []byte, at int) {
	putUint32(b, at, 0)
	var sum uint32
	for _, v := range b {
		sum += uint32(v)
	}
	putUint32(b, at, ^sum)
}

func putUint32(b []byte, at int, v uint32) { binary.BigEndian.PutUint32(b[at:], v) }
func putUint64(b []byte, at int, v uint64) { binary.BigEndian.PutUint64(b[at:], v) }

func roundUp(n int64) int64 { return (n + sector - 1) &^ (sector - 1) }
