package vhd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Image is the metadata of one image as it was when Parse read it. It is immutable.
type Image struct {
	footer footer
	header header
	parent string // file name of the parent; "" without one, and for a raw parent
	// encrypted says that blocks have to be decrypted.
	encrypted bool
	// metadata has the parsed fields of footer, header and locator.
	metadata []byte
}

// Parse reads the metadata of an image. r is read at multiples of 512 bytes, and never
// more than 6 KiB at a time. The error matches ErrNotVHD when r is no image of a
// supported kind; any other error means that the image is damaged, uses a feature that
// is not supported, or could not be read.
func Parse(r io.ReaderAt) (*Image, error) {
	img := &Image{}
	var foot [footerLen]byte
	if err := img.read(r, foot[:], 0); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, ErrNotVHD
		}
		return nil, err
	}
	var err error
	if img.footer, err = parseFooter(&foot); err != nil {
		return nil, err
	}
	if err := checkDynamic(r, img.footer.size); err != nil {
		return nil, err
	}
	var head [headerLen]byte
	if err := img.read(r, head[:], img.footer.headerOffset); err != nil {
		return nil, err
	}
	if img.header, err = parseHeader(&head, img.footer.size); err != nil {
		return nil, err
	}
	if img.footer.differencing && !img.HasRawParent() {
		if err := img.readParentName(r); err != nil {
			return nil, err
		}
	}
	if img.encrypted, err = readEncrypted(r, img.header.batmapOffset); err != nil {
		return nil, err
	}
	return img, nil
}

// checkDynamic returns ErrNotVHD for a fixed image whose disk, of size bytes, begins with a
// footer. The footer of a fixed image is behind the disk; all bytes before it were written
// by a guest, and may look like a dynamic image.
func checkDynamic(r io.ReaderAt, size int64) error {
	var b [footerLen]byte
	switch err := readFull(r, b[:], size); {
	case errors.Is(err, io.ErrUnexpectedEOF):
		return nil
	case err != nil:
		return err
	case isFixedFooter(&b):
		return fmt.Errorf("%w: it is a fixed one", ErrNotVHD)
	}
	return nil
}

// readEncrypted reports whether the header of the batmap at off names a key. Images of
// other programs have no batmap.
func readEncrypted(r io.ReaderAt, off int64) (bool, error) {
	var b [sectorLen]byte
	// Not Image.read: the checksum in this header changes with the blocks.
	err := readFull(r, b[:], off)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return false, nil
	}
	return isKeyedBatmap(&b), err
}

// readParentName reads the first locator that blktap would use.
func (img *Image) readParentName(r io.ReaderAt) error {
	if len(img.header.locators) == 0 {
		return errors.New("there is no parent locator that is understood")
	}
	l := img.header.locators[0]
	// Whole sectors: a device may be open for direct I/O.
	start := l.offset &^ (sectorLen - 1)
	skip := int(l.offset - start)
	b := make([]byte, (skip+l.length+sectorLen-1)&^(sectorLen-1))
	if err := img.read(r, b, start); err != nil {
		return err
	}
	var err error
	img.parent, err = parseLocatorText(b[skip : skip+l.length])
	return err
}

// read fills b from off and appends it to metadata.
func (img *Image) read(r io.ReaderAt, b []byte, off int64) error {
	if err := readFull(r, b, off); err != nil {
		return err
	}
	img.metadata = append(img.metadata, b...)
	return nil
}

// readFull fills b from off. An early end is io.ErrUnexpectedEOF.
func readFull(r io.ReaderAt, b []byte, off int64) error {
	n, err := r.ReadAt(b, off)
	switch {
	case n == len(b):
		return nil
	case err == nil || errors.Is(err, io.EOF):
		return fmt.Errorf("read at offset %d: %w", off, io.ErrUnexpectedEOF)
	}
	return err
}

// Size returns the size of the disk in bytes.
func (img *Image) Size() int64 { return img.footer.size }

// UUID returns the UUID of the image.
func (img *Image) UUID() UUID { return img.footer.uuid }

// IsHidden reports whether the image is a base copy: one that only other images use.
func (img *Image) IsHidden() bool { return img.footer.hidden }

// IsEncrypted reports whether the blocks of the image are encrypted.
func (img *Image) IsEncrypted() bool { return img.encrypted }

// HasParent reports whether blocks that the image does not have are those of another
// image. Otherwise they read as zeroes.
func (img *Image) HasParent() bool { return img.footer.differencing }

// HasRawParent reports whether the parent is a raw disk, which has no metadata.
func (img *Image) HasRawParent() bool {
	return img.footer.differencing && img.header.parentUUID == UUID{}
}

// ParentUUID returns the UUID that the parent must have.
func (img *Image) ParentUUID() UUID { return img.header.parentUUID }

// ParentName returns the file name of the parent, which is in the folder of the image, on
// LVM in /dev/mapper. It returns "" if there is no parent or if it is raw.
func (img *Image) ParentName() string { return img.parent }

// SameMetadata reports whether both images had the same metadata, byte for byte: footer,
// header and parent locator.
func (img *Image) SameMetadata(other *Image) bool {
	return string(img.metadata) == string(other.metadata)
}

// tableChunk is the size of one read of the table, a multiple of every sector size.
const tableChunk = 256 << 10

// AddBlocks reads the block allocation table and adds the blocks of the image to set, at
// their positions in the disk. It ignores blocks behind the end of set: an image may be
// larger than the image on top of it. It checks ctx between reads of 256 KiB, and reads r
// at multiples of 512 bytes.
func (img *Image) AddBlocks(ctx context.Context, r io.ReaderAt, set *BlockSet) error {
	size := min(img.footer.size, set.size)
	entries := (size + img.header.blockSize - 1) / img.header.blockSize
	buf := make([]byte, min(tableChunk, roundUp(entries*4)))
	for first := int64(0); first < entries; first += tableChunk / 4 {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		b := buf[:min(tableChunk, roundUp((entries-first)*4))]
		if err := readFull(r, b, img.header.tableOffset+first*4); err != nil {
			return err
		}
		for i := range min(entries-first, tableChunk/4) {
			if binary.BigEndian.Uint32(b[i*4:]) != unusedEntry {
				off := (first + i) * img.header.blockSize
				set.add(off, min(img.header.blockSize, size-off))
			}
		}
	}
	return nil
}

// roundUp rounds up to whole sectors.
func roundUp(n int64) int64 { return (n + sectorLen - 1) &^ (sectorLen - 1) }
