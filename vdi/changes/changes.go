package changes

// The bits of the statuses.
const (
	// Dirty in qemu:dirty-bitmap: the extent may have changed. Without it the extent has
	// the content of the older VDI.
	Dirty = 1
	// Unchanged in x-xapi:unchanged: the extent has the content of the older VDI. It
	// never comes with another bit.
	Unchanged = 1
	// ChangedToZero in x-xapi:unchanged: the extent may have changed, and reads as
	// zeroes now. Without any bit it may have changed and may have data.
	ChangedToZero = 2
)

// Set is a set of parts of a disk, such as an *xapi.ChangedBlocks and a *vhd.BlockSet.
type Set interface {
	// Size is the size of the disk in bytes.
	Size() int64
	// Run reports whether the byte at off is in the set, and how many bytes from off on
	// are like it: up to limit bytes, or to the end of the disk. off is in [0, Size) and
	// limit is above 0.
	Run(off, limit int64) (inSet bool, n int64)
}

// Map compares a disk with an older VDI. It is safe for concurrent use if its sets are.
type Map struct {
	// Changed are the parts that may differ from the older VDI. All behind its end counts
	// as changed.
	Changed Set
	// Allocated are the parts that may have data; the rest reads as zeroes. All behind its
	// end may have data. nil means that all of the disk may have data.
	Allocated Set
}

// Extent is a part of the disk with one status.
type Extent struct {
	Length int64 // bytes, above 0
	Status uint64
}

// maxExtents bounds the memory for one result: 64 KiB.
const maxExtents = 4096

// Dirty returns the extents of qemu:dirty-bitmap. The first begins at off, and each of the
// others at the end of the one before it, with another status. They end at off+n, or
// earlier if there are 4096 of them. off and n must not be negative.
func (m Map) Dirty(off, n int64) []Extent {
	return collect(off, n, func(off, limit int64) (uint64, int64) {
		changed, n := run(m.Changed, off, limit)
		if changed {
			return Dirty, n
		}
		return 0, n
	})
}

// Unchanged returns the extents of x-xapi:unchanged, by the rules of [Map.Dirty].
func (m Map) Unchanged(off, n int64) []Extent {
	changedTo := off // everything from off to it has changed: a long run is searched only once
	return collect(off, n, func(off, limit int64) (uint64, int64) {
		if off >= changedTo {
			changed, n := run(m.Changed, off, limit)
			if !changed {
				return Unchanged, n
			}
			changedTo = off + n
		}
		data, n := run(m.Allocated, off, changedTo-off)
		if data {
			return 0, n
		}
		return ChangedToZero, n
	})
}

// run is set.Run for any off: everything behind the end of the set counts as in it.
func run(set Set, off, limit int64) (inSet bool, n int64) {
	if set == nil || off >= set.Size() {
		return true, limit
	}
	return set.Run(off, limit)
}

// collect joins the runs that at returns for the n bytes from off on into extents.
func collect(off, n int64, at func(off, limit int64) (status uint64, n int64)) []Extent {
	var extents []Extent
	for end := off + n; off < end; {
		status, length := at(off, end-off)
		off += length
		switch last := len(extents) - 1; {
		case last >= 0 && extents[last].Status == status:
			extents[last].Length += length
		case len(extents) == maxExtents:
			return extents
		default:
			extents = append(extents, Extent{Length: length, Status: status})
		}
	}
	return extents
}
