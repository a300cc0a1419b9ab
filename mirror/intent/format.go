package intent

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"
)

// The layout of the file; see the package documentation.
const (
	magic         = "xapi-nbd mirror\n"
	formatVersion = 1
	slots         = 3
	slotStride    = bitsAt + maxRegions/8

	sumAt         = len(magic)
	versionAt     = sumAt + sha256.Size
	lengthAt      = versionAt + 4
	generationAt  = lengthAt + 4
	descriptionAt = generationAt + 8
	bitsAt        = 4096

	minRegion  = 16 << 20
	maxRegions = 1 << 20
)

// How a mirror ended.
const (
	endedPivot = "pivot"
	endedStop  = "stop"
)

// description is the part of a slot that does not change while a mirror runs, until it ends.
type description struct {
	Size      int64  `json:"size"`
	Region    int64  `json:"region"`
	Primary   string `json:"primary"`
	Secondary string `json:"secondary"`
	// Ended is "" while the mirror can be resumed.
	Ended   string     `json:"ended,omitempty"`
	EndedAt *time.Time `json:"ended_at,omitempty"`
}

func describe(m Mirror) description {
	d := description{Size: m.Size, Region: minRegion, Primary: m.Primary, Secondary: m.Secondary}
	for d.regions() > maxRegions {
		d.Region *= 2
	}
	return d
}

// regions returns the number of regions.
func (d description) regions() int {
	if d.Size == 0 {
		return 0
	}
	return int((d.Size-1)/d.Region) + 1
}

// slot is the content of the file.
type slot struct {
	generation uint64
	description
	bits bitmap
}

// encode returns the bytes of a slot.
func (s slot) encode() ([]byte, error) {
	text, err := json.Marshal(s.description)
	if err != nil {
		return nil, err
	}
	if len(text) > bitsAt-descriptionAt {
		return nil, fmt.Errorf("the names of the two ends are too long: %d bytes in all", len(text))
	}
	b := make([]byte, bitsAt, bitsAt+len(s.bits))
	copy(b, magic)
	binary.BigEndian.PutUint32(b[versionAt:], formatVersion)
	binary.BigEndian.PutUint32(b[lengthAt:], uint32(len(text)))
	binary.BigEndian.PutUint64(b[generationAt:], s.generation)
	copy(b[descriptionAt:], text)
	b = append(b, s.bits...)
	sum := sha256.Sum256(b[versionAt:])
	copy(b[sumAt:], sum[:])
	return b, nil
}

// The reasons for which a slot is not valid.
var (
	errNoMagic = errors.New("it is no write-intent log of a mirror")
	errDamaged = errors.New("it is damaged")
)

// decodeSlot decodes the bytes of a slot, of which it ignores what follows the bits.
func decodeSlot(b []byte) (slot, error) {
	if !bytes.HasPrefix(b, []byte(magic)) {
		return slot{}, errNoMagic
	}
	if len(b) < bitsAt {
		return slot{}, errDamaged
	}
	if v := binary.BigEndian.Uint32(b[versionAt:]); v != formatVersion {
		return slot{}, fmt.Errorf("it has the format %d, and not %d, or is damaged", v, formatVersion)
	}
	s := slot{generation: binary.BigEndian.Uint64(b[generationAt:])}
	length := int(binary.BigEndian.Uint32(b[lengthAt:]))
	if length > bitsAt-descriptionAt {
		return slot{}, errDamaged
	}
	if err := json.Unmarshal(b[descriptionAt:][:length], &s.description); err != nil {
		return slot{}, errDamaged
	}
	if s.Size < 0 || s.Region <= 0 || s.regions() > maxRegions {
		return slot{}, errDamaged
	}
	end := bitsAt + len(newBitmap(s.regions()))
	if end > len(b) {
		return slot{}, errDamaged
	}
	if sum := sha256.Sum256(b[versionAt:end]); !bytes.Equal(sum[:], b[sumAt:versionAt]) {
		return slot{}, errDamaged
	}
	s.bits = slices.Clone(b[bitsAt:end])
	return s, nil
}

// bitmap has one bit per region.
type bitmap []byte

func newBitmap(n int) bitmap { return make(bitmap, (n+7)/8) }

func (b bitmap) has(i int) bool { return b[i/8]&(1<<(i%8)) != 0 }
func (b bitmap) set(i int)      { b[i/8] |= 1 << (i % 8) }
func (b bitmap) unset(i int)    { b[i/8] &^= 1 << (i % 8) }

// setAll sets the first n bits.
func (b bitmap) setAll(n int) {
	for i := range n {
		b.set(i)
	}
}

// hasAll reports whether all bits from first to last are set.
func (b bitmap) hasAll(first, last int) bool {
	for i := first; i <= last; i++ {
		if !b.has(i) {
			return false
		}
	}
	return true
}

// keep unsets the bits that are not set in other.
func (b bitmap) keep(other bitmap) {
	for i := range b {
		b[i] &= other[i]
	}
}
