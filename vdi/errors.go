package vdi

import (
	"errors"
	"fmt"
	"time"

	"xapi-nbd/internal/fsys"
)

// The errors of this package, for errors.Is. Methods also return errors of package xapi.
var (
	// ErrStillAttaching means that the plug was not complete within the attach timeout.
	// It goes on, and is undone when it completes.
	ErrStillAttaching = errors.New("attach still in progress")
	// ErrClosed means that Manager.Close was called.
	ErrClosed = errors.New("shutting down")
	// ErrLocked means that another process uses the state folder or serves this host. The
	// error is a *LockedError.
	ErrLocked = fsys.ErrLocked
	// ErrNotLocked means that Manager.Lock has not succeeded yet.
	ErrNotLocked = errors.New("the state folder is not locked yet")
	// ErrLeft means that VBDs are left in the journal for the next process.
	ErrLeft = errors.New("VBDs are left behind")
	// ErrJournalLocked means that the lists of the state folder cannot be changed, because
	// another process has locked them for 10 s: it was stopped, or its storage hangs.
	ErrJournalLocked = errors.New("another process of the service has locked its journal and does not go on")
	// ErrInventory means that the inventory file cannot be read or lacks a key.
	ErrInventory = errors.New("inventory")
	// ErrLost means that another client of xapi unplugged the VBD while it was in use.
	ErrLost = errors.New("the VDI was detached by somebody else")
)

// LockedError is returned by Open, Lock, Attach and Recover while another process uses the
// state folder, or serves this host with another state folder. It matches [ErrLocked].
// Both locks are released when that process ends.
type LockedError struct {
	StateDir     string // of the other process; "" if it does not respond
	PID          int    // of the other process; 0 if unknown
	Installation string // INSTALLATION_UUID of the host; "" if the state folder is locked
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

// Is reports whether target is ErrLocked.
func (e *LockedError) Is(target error) bool { return target == ErrLocked }

// DetachingError is returned by Attach when the previous attachment of the VDI is still
// being detached. xapi does not plug a VDI before that is done.
type DetachingError struct{ Since time.Time }

func (e *DetachingError) Error() string {
	return "the old attachment of this VDI is still being detached, since " + e.Since.UTC().Format(time.RFC3339)
}

// SizeError is returned by Attach when the device is smaller than the VDI, or when xapi
// gives no size of the VDI. Sizes are in bytes.
type SizeError struct{ Device, Virtual int64 }

func (e *SizeError) Error() string {
	if e.Virtual == 0 {
		return fmt.Sprintf("the VDI has a virtual size of 0 bytes, and its device has %d", e.Device)
	}
	return fmt.Sprintf("the device is smaller than the VDI: it has %d bytes, the VDI has %d", e.Device, e.Virtual)
}

// LimitError is returned by Attach when Max VDIs are attached already.
type LimitError struct{ Max int }

func (e *LimitError) Error() string {
	return fmt.Sprintf("VBD limit reached: max_vbds is %d", e.Max)
}
