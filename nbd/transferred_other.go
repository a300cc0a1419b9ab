//go:build !linux

package nbd

import (
	"net"
	"sync/atomic"
)

// transferMeter tells how many bytes a peer has taken and sent.
type transferMeter struct{ counted atomic.Int64 }

func newTransferMeter(net.Conn) *transferMeter { return &transferMeter{} }

// add counts payload bytes that were sent or received.
func (m *transferMeter) add(bytes int64) { m.counted.Add(bytes) }

// total is the payload bytes of all transfers that have ended.
func (m *transferMeter) total() int64 { return m.counted.Load() }

// progress inside a transfer cannot be seen.
func (*transferMeter) progress() (bytes int64, known bool) { return 0, false }
