package vdi

import (
	"errors"
	"fmt"
	"time"
)

// The errors of this package that are not xapi's.
var (
	// ErrStillAttaching: the plug was not done within the attach timeout. It
	// goes on, and is undone when it completes.
	ErrStillAttaching = errors.New("attach still in progress")
	// ErrClosed: the manager is closing.
	ErrClosed = errors.New("shutting down")
	// ErrLocked: another process uses the state folder or serves this host; the
	// error is a *LockedError.
	ErrLocked = errors.New("in use by another instance")
	// ErrNotLocked: Lock has not succeeded yet.
	ErrNotLocked = errors.New("the state folder is not locked yet")
	// ErrLeft: VBDs are left in the journal for the next start.
	ErrLeft = errors.New("VBDs are left behind")
	// ErrInventory: the inventory file cannot be read, or lacks a key.
	ErrInventory = errors.New("inventory")
	// ErrLost: somebody else unplugged the VBD that was being read.
	ErrLost = errors.New("the VDI was detached by somebody else")
)

// LockedError is what Open, Attach and Recover return while another process uses
// the state folder, or works on this host with another one. It matches
// [ErrLocked]. Both pass when that process ends.
type LockedError struct {
	StateDir     string // of the other process, "" if it cannot be asked
	PID          int    // of the other process, 0 if it is not known
	Installation string // INSTALLATION_UUID of the host, "" if it is the state folder that is locked
}

func (e *LockedError) Error() string {
	if e.Installation == "" {
		return fmt.Sprintf("state folder is %v: %s", ErrLocked, e.StateDir)
	}
	text := fmt.Sprintf("this host (%s) is %v", e.Installation, ErrLocked)
	if e.PID != 0 {
		text += fmt.Sprintf(": process %d, state folder %s", e.PID, e.StateDir)
	}
	return text
}

// Is makes it match ErrLocked.
func (e *LockedError) Is(target error) bool { return target == ErrLocked }

// DetachingError is what Attach returns when the last attachment of the VDI is
// not detached yet and xapi would let a new one wait for it.
type DetachingError struct{ Since time.Time }

func (e *DetachingError) Error() string {
	return "the old attachment of this VDI is still being detached, since " + e.Since.UTC().Format(time.RFC3339)
}

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
