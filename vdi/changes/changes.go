// Package changes says what a client has to move to bring a copy of an older snapshot
// up to date: it joins the blocks that have changed since then with the blocks that have
// data. It gives the extents of two metadata contexts, whose names end with the uuid of
// the older VDI:
//
//   - "qemu:dirty-bitmap:<uuid>", defined by QEMU: [Dirty] is the only status bit.
//   - "x-xapi:unchanged:<uuid>": [Unchanged] and [ChangedToZero]. Its first bit has the
//     opposite meaning, as qemu-img takes a set bit of a dirty bitmap for a hole: with this
//     context "qemu-img convert -B" copies the changed blocks, with the other one it
//     copies all but those.
//
// What is not certain has changed and has data. The content of the disk must be frozen,
// which is the caller's to know: the changed blocks and the data belong to one moment.
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

// Map is what is known of one disk compared with an older VDI. It is safe for concurrent
// use if its sets are.
type Map struct {
	// Changed is what may differ from the older VDI. What is behind its end has changed.
	Changed Set
	// Allocated is what may have data; the rest reads as zeroes. nil means that all of
	// the disk may have data, and so may what is behind the end of the set.
	Allocated Set
}

// Extent is a part of the disk with one status.
type Extent struct {
	Length int64 // bytes, above 0
	Status uint64
}

// maxExtents bounds the memory for one answer: 64 KiB. Whoever needs more asks again.
const maxExtents = 4096

// Dirty returns the extents of qemu:dirty-bitmap that follow each other from off on.
// Neighbours differ. They end at off+n, or before it when there are 4096 of them. off
// and n are not negative.
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
	changedTo := off // what is before it has changed: long runs are not searched again for each part
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

// run is set.Run for any off: everything that the set does not cover is in it.
func run(set Set, off, limit int64) (inSet bool, n int64) {
	if set == nil || off >= set.Size() {
		return true, limit
	}
	return set.Run(off, limit)
}

// collect makes extents of what at says of the n bytes from off on.
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
