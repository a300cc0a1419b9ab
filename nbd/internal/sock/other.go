//go:build !linux

package sock

import (
	"net"
	"sync/atomic"
)

// Meter counts the bytes that a peer has received and sent.
type Meter struct{ counted atomic.Int64 }

// NewMeter returns a Meter for a connection.
func NewMeter(net.Conn) *Meter { return &Meter{} }

// Add counts payload bytes of a transfer that has ended, in either direction.
func (m *Meter) Add(bytes int64) { m.counted.Add(bytes) }

// Total returns the sum of all Adds.
func (m *Meter) Total() int64 { return m.counted.Load() }

// Progress returns false on this system.
func (*Meter) Progress() (bytes int64, known bool) { return 0, false }

// Unread finds bytes that the peer has sent and that have not been read.
type Unread struct{}

// NewUnread returns nil on this system.
func NewUnread(net.Conn) *Unread { return nil }

// Any reports whether there are such bytes.
func (*Unread) Any() bool { return false }
