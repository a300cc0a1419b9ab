package wire

import (
	"encoding/binary"
	"fmt"
)

// Info is the number of a kind of information about an export, section
// "NBD_OPT_INFO and NBD_OPT_GO".
type Info uint16

// The kinds of information.
const (
	InfoExport      Info = 0
	InfoName        Info = 1
	InfoDescription Info = 2
	InfoBlockSize   Info = 3
)

// InfoRequest is the data of INFO and of GO.
type InfoRequest struct {
	Name  string
	Infos []Info // the kinds that the client asks for, besides InfoExport
}

// Wants reports whether the client asked for i.
func (r InfoRequest) Wants(i Info) bool {
	for _, have := range r.Infos {
		if have == i {
			return true
		}
	}
	return false
}

// ParseInfoRequest reads the data of INFO or GO. It fails if the name is longer than
// [MaxString] or the lengths inside do not match the length of the data.
func ParseInfoRequest(data []byte) (InfoRequest, error) {
	c := cursor{b: data}
	r := InfoRequest{Name: c.string(MaxString)}
	n := int(c.uint16())
	if c.err == nil && len(c.b) != 2*n {
		c.fail("%d information requests announced, %d bytes left for them", n, len(c.b))
	}
	for i := 0; i < n && c.err == nil; i++ {
		r.Infos = append(r.Infos, Info(c.uint16()))
	}
	if c.err != nil {
		return InfoRequest{}, c.err
	}
	return r, nil
}

// Append appends the data of INFO or GO.
func (r InfoRequest) Append(b []byte) []byte {
	b = appendString(b, r.Name)
	b = binary.BigEndian.AppendUint16(b, uint16(len(r.Infos)))
	for _, i := range r.Infos {
		b = binary.BigEndian.AppendUint16(b, uint16(i))
	}
	return b
}

// BlockSizes are the size constraints of an export in bytes, section "Size
// constraints".
type BlockSizes struct {
	Min        uint32 // power of 2, 1 to 65536: offsets and lengths are its multiples
	Preferred  uint32 // power of 2, at least max(Min, 512)
	MaxPayload uint32 // at least Preferred
}

// ExportInfo is all the information about an export that information replies can have.
type ExportInfo struct {
	Size        uint64 // bytes
	Flags       TransmissionFlags
	Name        string
	Description string
	BlockSizes  BlockSizes
}

// AppendInfo appends the data of one RepInfo reply of kind i. For unknown kinds it appends
// only the number.
func (e *ExportInfo) AppendInfo(b []byte, i Info) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(i))
	switch i {
	case InfoExport:
		b = binary.BigEndian.AppendUint64(b, e.Size)
		b = binary.BigEndian.AppendUint16(b, uint16(e.Flags))
	case InfoName:
		b = append(b, e.Name...)
	case InfoDescription:
		b = append(b, e.Description...)
	case InfoBlockSize:
		b = binary.BigEndian.AppendUint32(b, e.BlockSizes.Min)
		b = binary.BigEndian.AppendUint32(b, e.BlockSizes.Preferred)
		b = binary.BigEndian.AppendUint32(b, e.BlockSizes.MaxPayload)
	}
	return b
}

// ParseInfo reads the data of one RepInfo reply into e and returns its kind. Unknown kinds
// are no error and change nothing.
func (e *ExportInfo) ParseInfo(data []byte) (Info, error) {
	c := cursor{b: data}
	i := Info(c.uint16())
	n := *e
	switch {
	case c.err != nil:
	case i == InfoExport:
		n.Size, n.Flags = c.uint64(), TransmissionFlags(c.uint16())
		c.end()
	case i == InfoName:
		n.Name = string(c.rest())
	case i == InfoDescription:
		n.Description = string(c.rest())
	case i == InfoBlockSize:
		n.BlockSizes = BlockSizes{Min: c.uint32(), Preferred: c.uint32(), MaxPayload: c.uint32()}
		c.end()
	}
	if c.err != nil {
		return i, fmt.Errorf("%v: %w", i, c.err)
	}
	*e = n
	return i, nil
}
