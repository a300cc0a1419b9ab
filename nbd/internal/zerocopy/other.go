//go:build !linux

package zerocopy

import (
	"errors"
	"net"
)

// ErrNoPipe means that data cannot be spliced and has to be read.
var ErrNoPipe = errors.New("no splice on this system")

// File does not exist on this system: NewFile returns nil.
type File struct{}

// NewFile returns nil.
func NewFile(int, func(off, n int64) error) *File { return nil }

// HasCache returns false.
func (*File) HasCache() bool { return false }

// HasCached returns false.
func (*File) HasCached(off, n int64, _ *[1]byte) bool { return false }

// ReadCached returns false.
func (*File) ReadCached([]byte, int64) bool { return false }

// Verify returns nil.
func (*File) Verify(off, n int64) error { return nil }

// Fill returns ErrNoPipe.
func (*File) Fill(*Pipes, int64, int) error { return ErrNoPipe }

// Pipes holds nothing on this system.
type Pipes struct{}

// Len returns 0.
func (*Pipes) Len() int { return 0 }

// Release does nothing.
func (*Pipes) Release() {}

// CloseIdle does nothing.
func CloseIdle() {}

// Sender does not exist on this system: NewSender returns nil.
type Sender struct{}

// NewSender returns nil.
func NewSender(net.Conn) *Sender { return nil }

// Send returns ErrNoPipe.
func (*Sender) Send([]byte, *Pipes) error { return ErrNoPipe }
