package wire

// DefaultPort is the TCP port that IANA has assigned to NBD.
const DefaultPort = 10809

// The protocol's own limits in bytes. Limits that are a server's or a client's
// choice stand where the choice is made.
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

	// DefaultMaxPayload is what works without any negotiation, section "Size
	// constraints".
	DefaultMaxPayload = 32 << 20
)
