package wire

// DefaultPort is the TCP port that IANA has assigned to NBD.
const DefaultPort = 10809

// The limits of the protocol itself, in bytes.
const (
	// MaxString bounds every string of the protocol: export names,
	// descriptions, error texts. Section "Values": "strings".
	MaxString = 4096

	// MaxMinBlock is the largest minimum block size that may be advertised,
	// section "Size constraints".
	MaxMinBlock = 65536

	// MinPreferredBlock is the smallest preferred block size that may be
	// advertised, section "Size constraints".
	MinPreferredBlock = 512

	// DefaultPreferredBlock is the preferred block size of a server that
	// advertises none, section "Size constraints".
	DefaultPreferredBlock = 4096

	// DefaultMaxPayload is the maximum payload of a server that advertises none, section
	// "Size constraints".
	DefaultMaxPayload = 32 << 20
)
