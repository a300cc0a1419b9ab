package xapi

import (
	"fmt"
	"io"
	"log/slog"
)

// Refs of xapi's objects are opaque: compare them and send them back, but do not build or
// parse them. They stay valid across a restart of xapi, until the object is destroyed. Store
// uuids instead.
type (
	// VMRef is the ref of a VM, the control domain for example.
	VMRef string
	// VDIRef is the ref of a VDI, a disk.
	VDIRef string
	// VBDRef is the ref of a VBD, a disk's attachment to a VM.
	VBDRef string
	// SRRef is the ref of an SR, the storage that holds VDIs.
	SRRef string
	// HostRef is the ref of a host.
	HostRef string
	// NetworkRef is the ref of a network.
	NetworkRef string
)

// redacted replaces a session ref in texts.
const redacted = "<session>"

// SessionRef is the ref of a session, a bearer secret. Formatted, logged or marshalled it is
// "<session>"; only string(ref) returns the secret. There are two exceptions: fmt cannot call
// methods of unexported struct fields, and encoding/json does not call those of map keys
// with a string type. Use a *Session there.
type SessionRef string

// Format implements fmt.Formatter for every verb, %#v and %x included.
func (SessionRef) Format(f fmt.State, _ rune) { io.WriteString(f, redacted) }

// String implements fmt.Stringer.
func (SessionRef) String() string { return redacted }

// GoString implements fmt.GoStringer.
func (SessionRef) GoString() string { return redacted }

// LogValue implements slog.LogValuer.
func (SessionRef) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText implements encoding.TextMarshaler, which JSON and TOML use.
func (SessionRef) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// IsUUID reports whether s has the form of xapi's uuids: 8-4-4-4-12 hexadecimal digits of
// either case.
func IsUUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i := range len(s) {
		switch c := s[i]; {
		case i == 8 || i == 13 || i == 18 || i == 23:
			if c != '-' {
				return false
			}
		case '0' <= c && c <= '9', 'a' <= c && c <= 'f', 'A' <= c && c <= 'F':
		default:
			return false
		}
	}
	return true
}
