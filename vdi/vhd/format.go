package vhd

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
)

// The layout of an image. All integers are big-endian.
const (
	footerLen  = 512
	headerLen  = 1024
	sectorLen  = 512
	versionOne = 0x00010000

	footerCookie = "conectix"
	headerCookie = "cxsparse"
	batmapCookie = "tdbatmap"

	locatorCount = 8
	locatorLen   = 24
	// maxLocatorText is longer than any path that a Linux kernel accepts.
	maxLocatorText = 4096
	// codeMacX marks a parent locator that holds a file: URL. blktap writes it.
	codeMacX = 0x4d616358

	unusedEntry = 0xffffffff
)

// The offsets of the used fields of a footer.
const (
	footerVersion     = 12
	footerDataOffset  = 16
	footerCurrentSize = 48 // the field at 40 is the size before the last resize
	footerType        = 60
	footerChecksum    = 64
	footerUUID        = 68
	footerHidden      = 85
)

// The offsets of the fields of a header of a dynamic image.
const (
	headerTableOffset = 16
	headerVersion     = 24
	headerMaxEntries  = 28
	headerBlockSize   = 32
	headerChecksum    = 36
	headerParentUUID  = 40
	headerLocators    = 576
)

// batmapKey is the offset of the byte in the header of the batmap that is not 0 if the
// image has the hash of a key.
const batmapKey = 29

// The types of images in a footer.
const (
	typeFixed        = 2
	typeDynamic      = 3
	typeDifferencing = 4
)

// Limits of supported images. The format addresses sectors with 32 bits, so no disk is
// larger than 2 TiB.
const (
	maxDiskSize  = 2 << 40
	minBlockSize = 64 << 10
	// BlockSize is the largest block size of an image in bytes, and the one that
	// XenServer's storage manager writes.
	BlockSize = 2 << 20
)

// ErrNotVHD is matched by the error for data that does not begin with a VHD footer: a
// raw disk, another format, or a fixed VHD.
var ErrNotVHD = errors.New("not a dynamic or differencing VHD image")

// UUID identifies an image. It is unrelated to the uuid of the VDI.
type UUID [16]byte

// String returns the UUID in hexadecimal.
func (u UUID) String() string { return hex.EncodeToString(u[:]) }

// footer has the used fields of a footer.
type footer struct {
	headerOffset int64
	size         int64
	differencing bool
	hidden       bool
	uuid         UUID
}

// parseFooter parses the footer copy at the beginning of an image.
func parseFooter(b *[footerLen]byte) (footer, error) {
	be := binary.BigEndian
	if !bytes.HasPrefix(b[:], []byte(footerCookie)) {
		return footer{}, ErrNotVHD
	}
	if got, want := checksum(b[:], footerChecksum), be.Uint32(b[footerChecksum:]); got != want {
		return footer{}, fmt.Errorf("the checksum of the footer is %#x, calculated %#x", want, got)
	}
	if v := be.Uint32(b[footerVersion:]); v != versionOne {
		return footer{}, fmt.Errorf("footer version %#x is not supported", v)
	}
	f := footer{hidden: b[footerHidden] != 0, uuid: UUID(b[footerUUID : footerUUID+16])}
	switch typ := be.Uint32(b[footerType:]); typ {
	case typeDynamic:
	case typeDifferencing:
		f.differencing = true
	default:
		return footer{}, fmt.Errorf("%w: its type is %d", ErrNotVHD, typ)
	}
	size, offset := be.Uint64(b[footerCurrentSize:]), be.Uint64(b[footerDataOffset:])
	if size == 0 || size > maxDiskSize || size%sectorLen != 0 {
		return footer{}, fmt.Errorf("a disk of %d bytes is not possible", size)
	}
	if offset < footerLen || offset > maxDiskSize || offset%sectorLen != 0 {
		return footer{}, fmt.Errorf("a header at offset %d is not possible", offset)
	}
	f.size, f.headerOffset = int64(size), int64(offset)
	return f, nil
}

// isFixedFooter reports whether b is the footer of a fixed image.
func isFixedFooter(b *[footerLen]byte) bool {
	return bytes.HasPrefix(b[:], []byte(footerCookie)) && binary.BigEndian.Uint32(b[footerType:]) == typeFixed
}

// isKeyedBatmap reports whether b is the header of the batmap of an encrypted image.
func isKeyedBatmap(b *[sectorLen]byte) bool {
	return bytes.HasPrefix(b[:], []byte(batmapCookie)) && b[batmapKey] != 0
}

// header has the used fields of a header.
type header struct {
	tableOffset  int64
	batmapOffset int64 // of the header of the batmap, which follows the table if there is one
	blockSize    int64
	parentUUID   UUID
	locators     []locator // those with the code MacX
}

// locator is the position of the parent's path in the image.
type locator struct {
	offset int64
	length int
}

// parseHeader parses the header of an image with a disk of size bytes.
func parseHeader(b *[headerLen]byte, size int64) (header, error) {
	be := binary.BigEndian
	if !bytes.HasPrefix(b[:], []byte(headerCookie)) {
		return header{}, errors.New("the header is missing")
	}
	if got, want := checksum(b[:], headerChecksum), be.Uint32(b[headerChecksum:]); got != want {
		return header{}, fmt.Errorf("the checksum of the header is %#x, calculated %#x", want, got)
	}
	if v := be.Uint32(b[headerVersion:]); v != versionOne {
		return header{}, fmt.Errorf("header version %#x is not supported", v)
	}
	blockSize := int64(be.Uint32(b[headerBlockSize:]))
	if blockSize < minBlockSize || blockSize > BlockSize || blockSize&(blockSize-1) != 0 {
		return header{}, fmt.Errorf("blocks of %d bytes are not supported", blockSize)
	}
	needed, entries := (size+blockSize-1)/blockSize, int64(be.Uint32(b[headerMaxEntries:]))
	if entries < needed {
		return header{}, fmt.Errorf("the table has %d entries, the disk has %d blocks", entries, needed)
	}
	offset := be.Uint64(b[headerTableOffset:])
	if offset < footerLen || offset > maxDiskSize || offset%sectorLen != 0 {
		return header{}, fmt.Errorf("a table at offset %d is not possible", offset)
	}
	h := header{tableOffset: int64(offset), blockSize: blockSize, parentUUID: UUID(b[headerParentUUID : headerParentUUID+16])}
	h.batmapOffset = h.tableOffset + roundUp(entries*4)
	h.locators = parseLocators(b)
	return h, nil
}

// parseLocators returns the locators that hold a file: URL. It leaves out those with an
// invalid position.
func parseLocators(b *[headerLen]byte) []locator {
	be := binary.BigEndian
	var found []locator
	for i := range locatorCount {
		l := b[headerLocators+i*locatorLen:][:locatorLen]
		length, offset := be.Uint32(l[8:]), be.Uint64(l[16:])
		if be.Uint32(l) != codeMacX || length == 0 || length > maxLocatorText || offset < footerLen || offset > maxDiskSize {
			continue
		}
		found = append(found, locator{offset: int64(offset), length: int(length)})
	}
	return found
}

// parseLocatorText returns the file name in the text of a locator. SM keeps all
// images of a chain in one folder, so only a name in the folder of the image is
// accepted: "file://./NAME" or "file://NAME".
func parseLocatorText(b []byte) (string, error) {
	text, isURL := strings.CutPrefix(string(bytes.TrimRight(b, "\x00")), "file://")
	name := strings.TrimPrefix(text, "./")
	switch {
	case !isURL:
		return "", errors.New("the parent locator is no file: URL")
	case name == "" || name == "." || name == "..", strings.ContainsAny(name, "/\x00"):
		return "", errors.New("the parent is not in the folder of the image")
	}
	return name, nil
}

// checksum is the ones' complement of the sum of all bytes but those of the checksum
// itself, which is at offset field.
func checksum(b []byte, field int) uint32 {
	var sum uint32
	for i, v := range b {
		if i < field || i >= field+4 {
			sum += uint32(v)
		}
	}
	return ^sum
}
