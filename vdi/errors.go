package vdi

import (
	"errors"
	"fmt"
)

// The errors of this package that are not xapi's.
var (
	// ErrStillAttaching: the plug was not done within the attach timeout. It
	// goes on, and is undone when it completes.
	ErrStillAttaching = errors.New("attach still in progress")
	// ErrClosed: the manager is closing.
	ErrClosed = errors.New("shutting down")
	// ErrLocked: another process uses the state folder.
	ErrLocked = errors.New("state folder is in use by another instance")
	// ErrNotLocked: Lock has not succeeded yet.
	ErrNotLocked = errors.New("the state folder is not locked yet")
	// ErrLeft: VBDs are left in the journal for the next start.
	ErrLeft = errors.New("VBDs are left behind")
	// ErrLost: somebody else unplugged the VBD that was being read.
	ErrLost = errors.New("the VDI was detached by somebody else")
)

// SizeError is what Attach returns when the device does not hold the whole VDI, or
// the VDI's size is not known. Sizes are in bytes.
type SizeError struct{ Device, Virtual int64 }

func (e *SizeError) Error() string {
	if e.Virtual == 0 {
		return fmt.Sprintf("the VDI has a virtual size of 0 bytes, and its device has %d", e.Device)
	}
	return fmt.Sprintf("the device is smaller than the VDI: it has %d bytes, the VDI has %d", e.Device, e.Virtual)
}

// LimitError is what Attach returns when too many VDIs are attached.
type LimitError struct{ Max int }

func (e *LimitError) Error() string {
	return fmt.Sprintf("VBD limit reached: max_vbds is %d", e.Max)
}
