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

// LimitError is what Attach returns when too many VDIs are attached.
type LimitError struct{ Max int }

func (e *LimitError) Error() string {
	return fmt.Sprintf("VBD limit reached: max_vbds is %d", e.Max)
}
