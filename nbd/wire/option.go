package wire

import "encoding/binary"

// Option is the number of an option of the handshake, section "Option types".
type Option uint32

// The options.
const (
	OptExportName      Option = 1
	OptAbort           Option = 2
	OptList            Option = 3
	OptPeekExport      Option = 4 // withdrawn
	OptStartTLS        Option = 5
	OptInfo            Option = 6
	OptGo              Option = 7
	OptStructuredReply Option = 8
	OptListMetaContext Option = 9
	OptSetMetaContext  Option = 10
	OptExtendedHeaders Option = 11
)

// OptionHeaderLen is the length in bytes of the header before an option's data.
const OptionHeaderLen = 16

// OptionHeader precedes the data of an option, section "Fixed newstyle
// negotiation".
type OptionHeader struct {
	Option Option
	Length uint32 // of the data, in bytes
}

// ParseOptionHeader reads an option's header. It does not check the length. It fails with a
// [*MagicError].
func ParseOptionHeader(b *[OptionHeaderLen]byte) (OptionHeader, error) {
	if got := binary.BigEndian.Uint64(b[:]); got != MagicOption {
		return OptionHeader{}, &MagicError{Where: "option", Got: got, Want: MagicOption}
	}
	return OptionHeader{
		Option: Option(binary.BigEndian.Uint32(b[8:])),
		Length: binary.BigEndian.Uint32(b[12:]),
	}, nil
}

// AppendOption appends an option with its data.
func AppendOption(b []byte, opt Option, data []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, MagicOption)
	b = binary.BigEndian.AppendUint32(b, uint32(opt))
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// ExportNameZeroes is how many zero bytes follow the reply to EXPORT_NAME unless both ends
// have set NO_ZEROES.
const ExportNameZeroes = 124

// ExportNameReplyLen is the length in bytes of the reply to EXPORT_NAME without the zeroes.
const ExportNameReplyLen = 10

// AppendExportNameReply appends the reply to EXPORT_NAME, section "NBD_OPT_EXPORT_NAME". It
// has no option reply header, but the size in bytes, the transmission flags and, if zeroes
// is true, ExportNameZeroes zero bytes.
func AppendExportNameReply(b []byte, size uint64, f TransmissionFlags, zeroes bool) []byte {
	b = binary.BigEndian.AppendUint64(b, size)
	b = binary.BigEndian.AppendUint16(b, uint16(f))
	if zeroes {
		b = append(b, make([]byte, ExportNameZeroes)...)
	}
	return b
}

// ParseExportNameReply reads the part of the reply before the zeroes.
func ParseExportNameReply(b *[ExportNameReplyLen]byte) (size uint64, f TransmissionFlags) {
	return binary.BigEndian.Uint64(b[:]), TransmissionFlags(binary.BigEndian.Uint16(b[8:]))
}
