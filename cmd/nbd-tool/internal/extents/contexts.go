package extents

// The metadata contexts of the blocks that have changed since a base: prefixes of the name
// of the base.
const (
	UnchangedContext = "x-xapi:unchanged:"  // of xapi-nbd
	DirtyContext     = "qemu:dirty-bitmap:" // of QEMU, and of others
)

// The states of UnchangedContext.
const (
	StateUnchanged uint64 = 1 << 0
	StateZeroNow   uint64 = 1 << 1 // changed, and reads as zeroes
)

// StateDirty is the state of DirtyContext.
const StateDirty uint64 = 1 << 0
